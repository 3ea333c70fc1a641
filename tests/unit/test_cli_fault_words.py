"""The report of a fault in words: one block with culprit, times, loss and what comes next."""

from __future__ import annotations

from typing import Any

from deepopt_cli.fault_words import fault_lines
from deepopt_cli.words import faults_line


def fault(**changes: Any) -> dict[str, Any]:
    return {
        "number": 3,
        "cause": "stopped",
        "culprit": {
            "rank": 2,
            "host": "node-b",
            "pid": 4711,
            "stages": [2],
            "step": 41,
            "action": "2F3",
            "message": "no heartbeat for 1.2 s; its process is stopped by a signal",
            "traceback": "",
        },
        "victims": [{"rank": 0, "message": "gone"}, {"rank": 1, "message": "gone"}],
        "replayed_steps": [39, 40],
        "source": "checkpoint",
        "next": "generation 4 begins",
        "outcome": "recovered",
        "times_s": {
            "detect": 1.2,
            "decide": 0.5,
            "fence": 0.01,
            "rendezvous": 0.8,
            "restore": 0.1,
            "replay": 0.25,
            "total": 2.86,
        },
        **changes,
    }


def test_victims_that_are_not_listed_are_counted() -> None:
    (line,) = [x for x in fault_lines([fault(num_victims=1023)], most=1) if "victims" in x]
    assert line == "  victims   ranks 0-1 and 1,021 more: gone"


def test_a_fault_is_one_block() -> None:
    assert fault_lines([fault()], most=3) == [
        "fault 3     rank 2 on node-b (pid 4711), stage 2: process stopped by a signal",
        "  sign      no heartbeat for 1.2 s; its process is stopped by a signal",
        "  doing     step 41, stage 2, op F, micro-batch 3",
        "  times     detected 1.20 s, judged 0.50 s, fenced 0.01 s, rendezvous 0.80 s, "
        "restored 0.10 s, replayed 0.25 s; 2.86 s in all",
        "  lost      no step: steps 39 to 40 were computed again, from the checkpoint of step 38",
        "  next      generation 4 begins; recovered",
        "  victims   ranks 0-1: gone",
    ]


def test_a_fault_that_is_not_over_says_what_is_known() -> None:
    lines = fault_lines([fault(times_s={"detect": 0.1}, outcome="open", victims=[])], most=1)
    assert lines[3] == "  times     detected 0.10 s"
    assert lines[-1] == "  next      generation 4 begins"


def test_without_replayed_steps_nothing_was_lost() -> None:
    lines = fault_lines([fault(replayed_steps=None)], most=1)
    assert "  lost      nothing: the step in work was begun again" in lines


def test_a_long_traceback_is_cut_at_its_beginning() -> None:
    culprit = {**fault()["culprit"], "traceback": "\n".join(f"line {n}" for n in range(30))}
    lines = fault_lines([fault(culprit=culprit)], most=1)
    assert "  ...       18 lines before are in its log" in lines
    assert "            line 29" in lines
    assert "            line 17" not in lines


def test_the_newest_faults_are_shown_and_all_are_counted() -> None:
    lines = fault_lines([fault(number=number) for number in range(1, 6)], most=2)
    assert lines[0] == "faults      5, the last 2:"
    assert [line.split()[1] for line in lines if line.startswith("fault ")] == ["4", "5"]


def test_the_end_of_a_job_counts_its_faults_by_cause() -> None:
    line = faults_line([fault(), fault(cause="exit", times_s={"total": 9.0}), fault()])
    assert line.startswith("3 (2 stopped, 1 exit); longest 9.00 s from the last good sign")
