"""A trace opens on its own, and several of them share one time axis."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepopt.schedule.ir import Action, parse_action
from deepopt.telemetry.trace import TRACKS, merge_steps, merge_traces, write_trace


@dataclass(frozen=True)
class FakeSpan:
    action: Action
    start_ns: int
    end_ns: int


def spans(text: str, *, start_ns: int) -> list[FakeSpan]:
    """Back to back, 1000 ns each."""
    return [
        FakeSpan(parse_action(word), start_ns + 1000 * i, start_ns + 1000 * (i + 1))
        for i, word in enumerate(text.split())
    ]


def work_of(path: Path) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


def test_compute_wait_send_and_reduce_are_on_tracks_apart(tmp_path: Path) -> None:
    path = tmp_path / "trace" / "step-3.rank-1.json"
    write_trace(path, rank=1, spans=spans("0RECV_F1 0F1 0SEND_F1 0B1 0W1 0REDUCE", start_ns=5))
    work = work_of(path)
    assert [(e["name"], TRACKS[e["tid"]], e["pid"]) for e in work] == [
        ("0RECV_F1", "wait", 1),
        ("0F1", "compute", 1),
        ("0SEND_F1", "send", 1),
        ("0B1", "compute", 1),
        ("0W1", "compute", 1),
        ("0REDUCE", "reduce", 1),
    ]
    assert [(e["ts"], e["dur"]) for e in work] == [(float(i), 1.0) for i in range(6)]
    assert work[1]["args"] == {"stage": 0, "op": "F", "microbatch": 1}


def test_the_tracks_and_ranks_have_names(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.json", rank=2, spans=spans("0F0", start_ns=0))
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]]
    assert names == ["rank 2", *TRACKS]


def test_merged_traces_keep_the_distance_in_time_between_ranks(tmp_path: Path) -> None:
    now = time.perf_counter_ns()
    write_trace(
        tmp_path / "0.json", rank=0, spans=spans("0F0 0F1", start_ns=now - 5_000_000_000)
    )
    write_trace(tmp_path / "1.json", rank=1, spans=spans("1F0", start_ns=now - 2_000_000_000))
    merge_traces([tmp_path / "1.json", tmp_path / "0.json"], target=tmp_path / "all.json")
    starts = {e["name"]: e["ts"] for e in work_of(tmp_path / "all.json")}
    assert starts["0F0"] == 0
    # Two readings of the wall clock against the performance counter: microseconds on a quiet
    # machine; half a second leaves room for an adjusted clock.
    assert abs(starts["1F0"] - 3e6) < 5e5


def test_no_spans_make_an_empty_trace(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.json", rank=0, spans=[])
    assert work_of(tmp_path / "a.json") == []


def test_the_traces_of_a_step_become_one_file_with_a_track_group_a_rank(tmp_path: Path) -> None:
    assert merge_steps(tmp_path / "absent") == []
    now = time.perf_counter_ns()
    for step in (3, 7):
        for rank in (0, 1):
            path = tmp_path / f"step-{step}.rank-{rank}.json"
            write_trace(path, rank=rank, spans=spans(f"{rank}F0", start_ns=now))
    assert merge_steps(tmp_path) == [tmp_path / "step-3.json", tmp_path / "step-7.json"]
    assert {e["name"] for e in work_of(tmp_path / "step-7.json")} == {"0F0", "1F0"}
