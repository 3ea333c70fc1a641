"""Events are one schema: what is written reads back, and every line has words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepopt.telemetry import events
from deepopt.telemetry.files import encode

EXAMPLES: list[events.Event] = [
    events.StateChanged(state="running", previous="starting", reason="all workers are ready"),
    events.GenerationFormed(
        generation=2, plan_id=1, num_workers=4, start_step=20, checkpoint="c"
    ),
    events.WorkerBecameReady(
        rank=1,
        generation=1,
        pid=7,
        host="a",
        stages=(1, 2),
        device="cpu",
        setup_s={"load": 0.5},
    ),
    events.WorkerLost(
        rank=1,
        generation=1,
        pid=7,
        host="a",
        step=3,
        action="2F5",
        failure="death",
        message="gone",
    ),
    events.FaultJudged(
        fault={
            "number": 1,
            "culprit": {"rank": 1, "host": "a", "message": "its process was killed by SIGKILL"},
            "next": "generation 2 begins",
        }
    ),
    events.FaultOver(
        fault={
            "number": 1,
            "outcome": "recovered",
            "times_s": {"detect": 0.02, "fence": 0.1, "total": 1.5},
        }
    ),
    events.CheckpointCommitted(step=20, path="/run/checkpoints/20", size_bytes=1_500_000),
    events.CheckpointWasNotWritten(step=20, reason="disk full", rank=2),
    events.MessageRefused(rank=0, generation=1, current_generation=2, message="StepReport"),
    events.NumbersWereBad(step=7, what="the loss of micro-batch 0 is nan", skipped=True),
    events.WeightWorkChosen(
        rank=1,
        generation=1,
        notes=(
            "layer 3 (conv, ConvBlock): split for first.weight",
            "layer 4 (x, X): fused: why",
        ),
    ),
    events.StopRequested(request="stop", checkpoint=True),
    events.Warned(message="metrics sink tensorboard is switched off"),
    events.Failed(message="the loss is not finite", exit_code=5),
]


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda e: e.kind)
def test_an_event_reads_back_from_its_line(event: events.Event) -> None:
    line = json.loads(encode(event.to_json()))
    assert list(line)[:2] == ["time", "kind"]
    parsed = events.parse_event(line)
    assert type(parsed) is type(event)
    assert json.loads(encode(parsed.to_json())) == line  # type: ignore[union-attr]
    assert events.headline(line) == event.headline()
    assert "\n" not in event.headline()


def test_every_kind_has_an_example() -> None:
    assert {event.kind for event in EXAMPLES} == set(events.KINDS)


def test_a_lost_worker_is_named_with_host_step_and_action() -> None:
    headline = EXAMPLES[3].headline()
    assert headline == "lost rank 1 (death) on a pid 7, step 3, action 2F5: gone"


def test_a_fault_is_told_with_its_culprit_and_then_with_its_times() -> None:
    assert [event.headline() for event in EXAMPLES if event.kind in ("fault", "recovered")] == [
        "fault 1: rank 1 on a: its process was killed by SIGKILL; generation 2 begins",
        "fault 1 recovered in 1.50 s: detect 0.02 s, fence 0.10 s",
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"time": "t", "kind": "rebalanced", "gain_s": 0.5}, "rebalanced gain_s=0.5"),
        ({"time": "t", "kind": "checkpoint", "stepp": 3}, "checkpoint stepp=3"),
        ({"kind": "warning", "message": "x", "added_later": 1}, "warning: x"),
    ],
)
def test_lines_of_another_version_still_have_words(record: dict[str, Any], words: str) -> None:
    assert events.headline(record) == words
