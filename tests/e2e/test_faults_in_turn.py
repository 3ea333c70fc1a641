"""One job that is hit by one fault after the other, with real signals: it goes on, and no loss changes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepopt.cluster.process_table import descendants
from deepopt.job_file import load_job
from support import launcher
from support.worker_processes import losses_of, make_plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 110
HELD_AT = 30  # late enough for two faults before it, each a few steps after the last


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = load_job(launcher.write_job(folder, checkpoint={"every": 0}))
    losses = losses_of(job, make_plan(job), run_dir=folder, last_step=STEPS)
    return dict(enumerate(losses, start=1))


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run of two workers whose steps take a quarter of a second; ended whatever happens."""
    job = launcher.write_job(
        tmp_path,
        training={"steps": STEPS},
        checkpoint={"every": 10},
        worker={"device": "emulated"},
        emulation={"forward_ms": 6, "input_ms": 6, "weight_ms": 3},
        pipeline={"placement": "mirror"},
        faults={
            "max_restarts": 9,
            "inject": [{"hold": {"rank": 1, "step": HELD_AT, "generation": 3}}],
        },
    )
    run_dir = tmp_path / "run"
    launched = launcher.run("launch", job, "--workers", 2, "--run-dir", run_dir, "--detach")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    yield run_dir
    launcher.run("stop", run_dir, "--kill")


def supervisor(run_dir: Path) -> int:
    return int(json.loads((run_dir / "supervisor.json").read_text())["pid"])


def head(run_dir: Path) -> int:
    """Process id of the head."""
    (pid,) = [
        process.pid
        for process in descendants(supervisor(run_dir))
        if b"HeadActor" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    ]
    return pid


def after(run_dir: Path, *, steps: int) -> dict[str, Any]:
    """The status some steps from now."""
    now = launcher.wait_for_file(run_dir, lambda s: s["state"] == "running")["step"]
    return launcher.wait_for_file(
        run_dir, lambda s: s["state"] == "running" and s["step"] >= now + steps
    )


def recovered(run_dir: Path, number: int) -> dict[str, Any]:
    """The report of a fault, when it is over."""

    def is_over(status: dict[str, Any]) -> bool:
        assert status["state"] != "failed", status["error"]
        return any(f["number"] == number and f["outcome"] != "open" for f in status["faults"])

    faults = launcher.wait_for_file(run_dir, is_over)["faults"]
    fault: dict[str, Any] = next(f for f in faults if f["number"] == number)
    assert fault["outcome"] == "recovered", fault
    return fault


def test_a_job_outlives_worker_head_and_supervisor_and_no_loss_changes(
    unbroken: dict[int, float], run_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    status = launcher.wait_for_file(run_dir, lambda s: s["step"] >= 8)
    job_id = status["job_id"]

    os.kill(status["workers"][1]["pid"], signal.SIGKILL)
    killed = recovered(run_dir, 1)
    assert (killed["cause"], killed["culprit"]["rank"]) == ("exit", 1)
    # The host's agent may name the signal when the recovery is over.
    launcher.wait_for_file(
        run_dir,
        lambda s: s["faults"][0]["culprit"]["message"] == "its process was killed by SIGKILL",
    )

    os.kill(after(run_dir, steps=6)["workers"][0]["pid"], signal.SIGSTOP)
    stopped = recovered(run_dir, 2)
    assert (stopped["cause"], stopped["culprit"]["rank"]) == ("stopped", 0)

    held = recovered(run_dir, 3)
    assert (held["cause"], held["culprit"]["rank"]) == ("held_gil", 1)

    before = after(run_dir, steps=4)
    os.kill(head(run_dir), signal.SIGKILL)
    replaced = recovered(run_dir, 4)
    assert (replaced["cause"], replaced["culprit"]) == ("head", None)
    now = after(run_dir, steps=4)
    assert now["generation"] == before["generation"]
    assert [w["pid"] for w in now["workers"]] == [w["pid"] for w in before["workers"]]

    # The new head is as good as the first.
    os.kill(now["workers"][1]["pid"], signal.SIGKILL)
    again = recovered(run_dir, 5)
    assert (again["cause"], again["culprit"]["rank"]) == ("exit", 1)

    doomed = descendants(supervisor(run_dir))
    os.kill(supervisor(run_dir), signal.SIGKILL)
    until_s = time.monotonic() + launcher.TIMEOUT_S
    while any(process.is_alive() for process in doomed):
        assert time.monotonic() < until_s, doomed
        time.sleep(0.05)
    resumed = launcher.run("resume", run_dir, "--detach")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    at = launcher.wait_for_file(run_dir, lambda s: s["state"] == "running" and s["step"] > 0)

    os.kill(supervisor(run_dir), signal.SIGTERM)  # as one whose host is taken away
    status = launcher.wait_for_file(run_dir, lambda s: s["state"] in ("stopped", "finished"))
    assert status["checkpoint_step"] == status["step"] >= at["step"] - 1
    until_s = time.monotonic() + launcher.TIMEOUT_S
    while launcher.processes_of(run_dir):
        assert time.monotonic() < until_s, launcher.processes_of(run_dir)
        time.sleep(0.05)
    result = launcher.run("resume", run_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    status = launcher.status(run_dir)
    assert (status["state"], status["step"], status["job_id"]) == ("finished", STEPS, job_id)
    assert launcher.losses(run_dir) == unbroken
    assert [f["outcome"] for f in status["faults"]] == ["recovered"] * 5
    for fault in status["faults"]:
        record_property(f"fault {fault['number']} {fault['cause']}", fault["times_s"])
