"""`status`, `logs` and `stop` need only the run directory, whatever is or is not in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt.config import JobConfig
from deepopt.job_file import dump_job
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt_cli.app import app
from support import fake_supervisor
from support.fake_supervisor import FakeSupervisors


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "job.yaml").write_text(dump_job(JobConfig()))
    return run_dir


@pytest.fixture
def supervisors() -> Iterator[FakeSupervisors]:
    supervisors = FakeSupervisors()
    yield supervisors
    supervisors.close()


@pytest.fixture
def other_process() -> Iterator[int]:
    """A living process that is not this one."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def show(run_dir: Path) -> dict[str, Any]:
    result = deepopt("status", run_dir, "--json")
    assert result.exit_code == 0, result.stderr
    shown: dict[str, Any] = json.loads(result.stdout)
    return shown


def test_status_of_a_running_job(run_dir: Path, other_process: int) -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status(last_step=60))
    fake_supervisor.write_supervisor(run_dir, pid=other_process)
    shown = show(run_dir)
    assert (shown["state"], shown["step"], shown["generation"]) == ("running", 3, 1)
    assert shown["supervisor_alive"] is True
    assert shown["run_dir"] == str(run_dir)
    assert {"rank", "pid", "host", "stages"} <= set(shown["workers"][0])
    words = deepopt("status", run_dir).stdout
    assert "state       running (as of" in words
    assert "host-a" in words
    assert "resume" not in words


def test_status_of_a_job_whose_supervisor_died(run_dir: Path, other_process: int) -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status())
    # The pid lives, but as another process than the one that was recorded.
    fake_supervisor.write_supervisor(run_dir, pid=other_process, start_time=1)
    assert show(run_dir)["supervisor_alive"] is False
    words = deepopt("status", run_dir).stdout
    assert "recorded as running, but its supervisor is gone" in words
    assert f"hint: deepopt resume {run_dir}" in words


def test_status_of_a_job_on_another_host(run_dir: Path) -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status())
    content = {"pid": os.getpid(), "start_time": 1, "host": "a-host-far-away"}
    fake_supervisor.write(run_dir / "supervisor.json", content)
    assert show(run_dir)["supervisor_alive"] is None
    assert "running (as of" in deepopt("status", run_dir).stdout


def test_status_before_the_head_has_written_anything(run_dir: Path) -> None:
    shown = show(run_dir)
    assert (shown["state"], shown["workers"]) == ("starting", [])
    assert (
        "recorded as starting, but its supervisor is gone" in deepopt("status", run_dir).stdout
    )


def test_status_of_a_failed_job_names_the_culprit(run_dir: Path) -> None:
    culprit = {"rank": 1, "host": "b", "pid": 7, "step": 5, "action": "2F6", "traceback": "TB"}
    error = {"message": "rank 1 failed", "remedy": "", "culprit": culprit, "victims": []}
    failed = fake_supervisor.status(state="failed", exit_code=5, error=error)
    fake_supervisor.write(run_dir / "status.json", failed)
    words = deepopt("status", run_dir).stdout
    assert "error: rank 1 failed" in words
    assert "step 5, stage 2, op F, micro-batch 6" in words
    assert "TB" in words


def test_a_folder_that_is_no_run_directory_is_refused_with_those_nearby(run_dir: Path) -> None:
    result = deepopt("status", run_dir.parent)
    assert result.exit_code == 1
    assert "is not a run directory: it has no job.yaml" in result.stderr
    assert f"hint: near it there is {run_dir}" in result.stderr


def test_a_damaged_status_is_one_error(run_dir: Path) -> None:
    (run_dir / "status.json").write_text("{")
    result = deepopt("status", run_dir)
    assert result.exit_code == 1
    assert "status.json is not a JSON object" in result.stderr
    (run_dir / "status.json").unlink()
    (run_dir / "supervisor.json").write_text('{"pid": "x"}')
    assert "supervisor.json lacks pid" in deepopt("status", run_dir).stderr


# --- logs ------------------------------------------------------------------------------------


@pytest.fixture
def logged(run_dir: Path) -> Path:
    logs = run_dir / "logs"
    logs.mkdir()
    (logs / "supervisor.log").write_text("ray is up\n")
    for rank in (0, 1, 10):
        (logs / f"rank-{rank}.log").write_text(f"I am {rank}\nno newline")
    plan = Plan(
        plan_id=1,
        layer_names=("a", "b"),
        boundaries=(0, 1),
        placement=PlacementKind.LINE,
        schedule="1f1b",
        pipeline_size=2,
        data_size=1,
        num_microbatches=4,
        num_groups=2,
    )
    fake_supervisor.write(run_dir / "plan.json", plan.to_json())
    return run_dir


def test_all_logs_come_with_their_names_in_the_order_of_ranks(logged: Path) -> None:
    assert deepopt("logs", logged).stdout.splitlines() == [
        "supervisor | ray is up",
        "rank-0 | I am 0",
        "rank-0 | no newline",
        "rank-1 | I am 1",
        "rank-1 | no newline",
        "rank-10 | I am 10",
        "rank-10 | no newline",
    ]


def test_the_log_of_one_rank_comes_as_it_is(logged: Path) -> None:
    assert deepopt("logs", logged, "--rank", 10).stdout == "I am 10\nno newline\n"


def test_the_logs_of_a_stage_are_those_of_its_holders(logged: Path) -> None:
    assert deepopt("logs", logged, "--stage", 1).stdout == "I am 1\nno newline\n"
    assert (
        "rank 0 does not hold stage 1"
        in deepopt("logs", logged, "--stage", 1, "--rank", 0).stderr
    )
    assert "the plan has stages 0 to 1" in deepopt("logs", logged, "--stage", 2).stderr


def test_a_missing_log_is_an_error_that_names_those_there(logged: Path, run_dir: Path) -> None:
    result = deepopt("logs", logged, "--rank", 7)
    assert result.exit_code == 1
    assert "there is no log of rank 7" in result.stderr
    assert "hint: there are: supervisor, rank-0, rank-1, rank-10" in result.stderr


def test_following_shows_what_comes_and_ends_with_the_job(
    logged: Path, other_process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepopt_cli.cmd_logs.POLL_S", 0.01)
    fake_supervisor.write(logged / "status.json", fake_supervisor.status())
    fake_supervisor.write_supervisor(logged, pid=other_process)

    def end_the_job() -> None:
        with (logged / "logs" / "rank-10.log").open("a") as file:
            file.write(" here\nlast")
        finished = fake_supervisor.status(state="finished")
        fake_supervisor.write(logged / "status.json", finished)
        fake_supervisor.write_supervisor(logged, pid=other_process, start_time=1)

    timer = threading.Timer(0.2, end_the_job)
    timer.start()
    result = deepopt("logs", logged, "-f", "--rank", 10)
    timer.join()
    assert result.stdout == "I am 10\nno newline here\nlast\n"
    assert result.stderr == "the job is finished\n"


# --- stop ------------------------------------------------------------------------------------


def test_stop_ends_a_job_with_a_checkpoint_and_waits_for_it(
    run_dir: Path, supervisors: FakeSupervisors
) -> None:
    pid = supervisors.spawn(run_dir, steps=10_000, teardown_s=0.2)
    fake_supervisor.wait_for(run_dir / "supervisor.json")
    result = deepopt("stop", run_dir)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("stopped at step ")
    assert not fake_supervisor.lives(pid)
    assert json.loads((run_dir / "seen.jsonl").read_text()) == {
        "kind": "stop",
        "checkpoint": True,
    }


def test_stop_kill_asks_for_no_checkpoint(run_dir: Path, supervisors: FakeSupervisors) -> None:
    supervisors.spawn(run_dir, steps=10_000)
    fake_supervisor.wait_for(run_dir / "supervisor.json")
    assert deepopt("stop", run_dir, "--kill").exit_code == 0
    assert json.loads((run_dir / "seen.jsonl").read_text()) == {"kind": "kill"}


def test_stop_gives_up_after_its_timeout(run_dir: Path, other_process: int) -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status())
    fake_supervisor.write_supervisor(run_dir, pid=other_process)
    result = deepopt("stop", run_dir, "--timeout", 0.2)
    assert result.exit_code == 3
    assert "the job is still running after 0.2 s" in result.stderr
    assert "--kill" in result.stderr


def test_stop_of_a_job_that_has_ended_says_so(run_dir: Path) -> None:
    finished = fake_supervisor.status(state="finished")
    fake_supervisor.write(run_dir / "status.json", finished)
    result = deepopt("stop", run_dir)
    assert (result.exit_code, result.stdout) == (0, "nothing to stop: the job is finished\n")


def test_stop_of_a_job_that_died_says_so(run_dir: Path) -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status())
    result = deepopt("stop", run_dir)
    assert result.exit_code == 0
    assert "recorded as running, but its supervisor is gone" in result.stderr


def test_stop_of_a_job_that_fails_meanwhile_returns_its_exit_code(
    run_dir: Path, supervisors: FakeSupervisors
) -> None:
    error = {"message": "out of memory"}
    supervisors.spawn(
        run_dir, end="failed", exit_code=5, error=error, heeds_stop=False, steps=20
    )
    fake_supervisor.wait_for(run_dir / "supervisor.json")
    result = deepopt("stop", run_dir)
    assert result.exit_code == 5
    assert "out of memory" in result.stderr
