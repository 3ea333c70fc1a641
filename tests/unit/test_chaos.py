"""The parts of `make chaos` that decide whether a row passes."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.matrix import ACTS, Act, Row, Seen, kill
from chaos.play import wrong_losses
from chaos.report import Result, sum_of, table
from chaos.soak import BLOWS, Outcome, draw_blows, find_leak
from chaos.stage import judge
from deepopt.config import JobConfig


def fault(
    cause: str = "exit", *, rank: int = 1, total: float = 1.0, **more: Any
) -> dict[str, Any]:
    return {
        "cause": cause,
        "culprit": {"rank": rank},
        "outcome": "recovered",
        "times_s": {"detect": 0.5, "total": total},
        **more,
    }


def verdict(row: Row, *faults: dict[str, Any]) -> str:
    seen = Seen(faults=faults)
    causes = [f["cause"] for f in faults]
    return judge(row, seen, Result(act="a", name="n", causes=causes, times_s=sum_of(faults)))


def test_a_row_passes_with_the_right_cause_culprit_and_time() -> None:
    row = kill("F")
    assert verdict(row, fault()) == ""
    assert verdict(row) == "no report"
    assert verdict(row, fault("stuck")) == "reported as stuck, not exit"
    assert verdict(row, fault(rank=0)) == "rank [0] is blamed, not 1"
    assert verdict(row, fault(total=9.0)) == "9.00 s, more than 5 s"
    assert verdict(row, fault(outcome="failed")) == "outcome failed"
    assert verdict(row, fault(), fault()) == "reported as exit, exit, not exit"


def test_scripted_faults_follow_each_other_through_the_generations() -> None:
    rows = (kill("F"), Row(name="flip", causes=(), script=("flip", {})), kill("SAVE"))
    entries = Act(name="a", rows=rows, steps=100).inject()
    assert [(next(iter(e)), next(iter(e.values()))["generation"]) for e in entries] == [
        ("kill", 1),
        ("flip", 2),
        ("kill", 2),
    ]
    steps = [next(iter(e.values()))["step"] for e in entries]
    assert steps == sorted(set(steps))
    assert steps[-1] % 10 == 0  # a checkpoint is due there


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.name)
def test_every_act_is_a_job_that_ends_after_its_last_scripted_fault(act: Act) -> None:
    job = JobConfig.model_validate({"faults": {"inject": act.inject()}})
    assert all(f.point.step < act.steps for f in job.faults.inject)


def test_losses_are_compared_bit_for_bit() -> None:
    assert wrong_losses([(1, 0.5), (2, 0.25), (2, 0.25)], {1: 0.5, 2: 0.25}) == []
    assert wrong_losses([(2, 0.25 + 2**-50)], {2: 0.25}) == [(2, 0.25 + 2**-50)]


def test_the_same_seed_strikes_the_same_blows() -> None:
    blows = draw_blows(200, seed=3, workers=2)
    assert blows == draw_blows(200, seed=3, workers=2)
    assert {(b.target, b.number) for b in blows} == set(BLOWS)
    assert all(10.0 <= b.after_s <= 15.0 for b in blows)


def test_a_file_that_stays_open_with_each_fault_is_a_leak() -> None:
    before = {"HeadActor": [1, 100], "WorkerActor": [3, 60]}
    fine = Outcome(before=before, after={"HeadActor": [1, 105], "WorkerActor": [3, 58]})
    assert find_leak(fine, faults=50) == ""
    files = Outcome(before=before, after={"HeadActor": [1, 150]})
    assert find_leak(files, faults=50) == "150 open files in HeadActor, 100 in the beginning"
    more = Outcome(before=before, after={"WorkerActor": [4, 60]})
    assert find_leak(more, faults=50) == "4 processes of WorkerActor, 3 in the beginning"


def test_the_table_says_why_a_row_was_not_run() -> None:
    text = table([Result(act="a", name="clock", not_run="no second clock")])
    assert "not run" in text
    assert "no second clock" in text
