"""The parts of the benchmarks that decide what a figure means."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# A contender without torch: steps of so much CPU time each. It has a session of its own, and ends
# with the test's process even where that was killed.
WORKER = """
import json, os, sys, time
parent = os.getppid()
with open(sys.argv[1], "w", buffering=1) as out:
    for step in range(1, 10000):
        while time.process_time() < step * float(sys.argv[2]):
            if os.getppid() != parent:
                sys.exit()
        out.write(json.dumps({"step": step, "loss": float(sys.argv[3]) / step}) + "\\n")
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def worker(load: Any, *, step_s: float, loss: float = 4.0) -> Any:
    command = (sys.executable, "-c", WORKER, "{out}", str(step_s), str(loss))
    return load("_time_slices").Contender(command=command)


def measure(load: Any, contenders: dict[str, Any], *, cycles: int = 3) -> dict[str, Any]:
    measured: dict[str, Any] = load("_time_slices").measure(
        contenders, warm_up=3, cycles=cycles, slice_s=0.1, threads=1, timeout_s=60.0
    )
    return measured


def test_the_faster_contender_is_measured_as_such(load: Any) -> None:
    contenders = {"fast": worker(load, step_s=0.01), "slow": worker(load, step_s=0.1)}
    measured = measure(load, contenders, cycles=6)
    step_s = {name: one.wall_s / one.steps for name, one in measured.items()}
    assert step_s["slow"] > step_s["fast"]


def test_contenders_with_other_losses_are_not_compared(load: Any) -> None:
    contenders = {"a": worker(load, step_s=0.01), "b": worker(load, step_s=0.01, loss=4.1)}
    with pytest.raises(ValueError, match=r"step 1: a has loss 4.0, b has loss 4.1"):
        measure(load, contenders)


def test_losses_that_differ_by_rounding_are_the_same_training(load: Any) -> None:
    check = load("_time_slices").check_same_training
    check({"a": [5.4, 4.2], "b": [5.4 * (1 + 1e-6), 4.2]})
    with pytest.raises(ValueError, match="step 2"):
        check({"a": [5.4, 4.2], "b": [5.4, 4.21]})


def test_a_contender_that_dies_is_reported_with_its_last_words(load: Any) -> None:
    command = (sys.executable, "-c", "raise SystemExit('no such model')")
    with pytest.raises(RuntimeError, match="no such model"):
        measure(load, {"dead": load("_time_slices").Contender(command=command)})


def test_nothing_of_a_command_is_left_even_if_it_left_its_session(
    load: Any, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    orphan = f"sleep 60 & echo $! > {pid_file}.new; mv {pid_file}.new {pid_file}"
    command = ("setsid", "-f", "sh", "-c", orphan)
    with load("_processes").started(command, log=tmp_path / "log", grace_s=0.2):
        deadline = time.monotonic() + 60
        while not pid_file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_last_line_of_a_step_stands_and_half_a_line_does_not(
    load: Any, tmp_path: Path
) -> None:
    lines = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "loss": 3.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert [record["loss"] for record in load("_time_slices").read_steps(path)] == [5.0, 3.0]
    assert load("_time_slices").read_steps(tmp_path / "absent") == []


def test_the_ratio_says_its_aim_where_there_is_one(load: Any) -> None:
    ratio_line = load("_report").ratio_line
    assert ratio_line(1.034, aim=1.0) == "ratio: 1.03 (aim 1.00)"
    assert ratio_line(0.5, aim=None) == "ratio: 0.50"


def test_tables_are_markdown(load: Any) -> None:
    assert load("_report").table(("name", "ms"), [("a", "10"), ("long name", "9")]) == (
        "| name      | ms |\n| --------- | -: |\n| a         | 10 |\n| long name |  9 |"
    )


def test_the_stall_of_a_checkpoint_is_what_the_step_after_it_takes_more(load: Any) -> None:
    times = {step: 0.1 + (0.02 if step % 10 == 1 else 0.0) for step in range(10, 32)}
    measured = load("_time_slices").Measured(
        losses=(), steps=22, wall_s=1.0, cpu_s=1.0, others_cpu_s=0.0, step_times_s=times
    )
    told = load("ft_overhead")._stall(measured)
    assert "20.0 ms more than the others' 100.0 ms: 2.00 % of 10 steps" in told


def test_the_95th_percentile_of_recoveries_is_told_beside_its_aim(load: Any) -> None:
    recovery = load("_recovery_cases")
    faults = [
        recovery.Fault(back_s=s / 10, repeated=1, phases_s={}, step_s=0.3) for s in range(1, 21)
    ]
    name, *cells = recovery._row(recovery.OURS, faults)
    assert name == "death: deepopt, mirror, spare"
    assert cells == ["20", "1.05", "2.00", "2.00", "2", "1.0", "0.30"]


def test_recoveries_of_chosen_contenders_are_measured_in_turns(load: Any) -> None:
    chosen = load("_recovery_cases").chosen
    assert [
        case.name for case in chosen(["torchrun pipelining", "death: deepopt, mirror, spare"])
    ] == [
        "death: deepopt, mirror, spare",
        "death: torchrun pipelining, disk",
    ]
    assert len(chosen([])) == 10
    with pytest.raises(
        ValueError, match='"deth" is in none of "death: deepopt, mirror, spare"'
    ):
        chosen(["deth"])


def recoveries(load: Any, medians_s: dict[str, float]) -> Any:
    """Told by `recovery.py` when each case has a fault of so many seconds."""
    cases = load("_recovery_cases")
    found = {
        case: [cases.Fault(back_s=medians_s[case.name], repeated=0, phases_s={})]
        for case in cases.CASES
        if case.name in medians_s
    }
    return cases.compare(found)


def test_recoveries_are_compared_with_the_faster_of_the_two_peers_of_the_aim(load: Any) -> None:
    told = recoveries(
        load,
        {
            "death: deepopt, mirror, spare": 0.5,
            "hang: deepopt, mirror, spare": 1.5,
            "death: torchrun pipelining, disk": 4.0,
            "death: torchrun FSDP2 + DCP, disk": 6.0,
            "death: Ray Train, disk": 7.0,
        },
    )
    assert "death: torchrun pipelining, disk 4.00 s: 8.00 times" in told
    assert "the ratio is against torchrun FSDP2 + DCP" in told
    assert told.splitlines()[-1] == "ratio: 12.00 (aim 10.00)"


def test_no_aim_is_said_of_recoveries_beside_other_peers_alone(load: Any) -> None:
    peer = {"death: torchrun pipelining, disk": 4.0}
    told = recoveries(load, {"death: deepopt, mirror, spare": 0.5} | peer)
    assert told.splitlines()[-1] == "ratio: 8.00"
    assert recoveries(load, peer) == ""
