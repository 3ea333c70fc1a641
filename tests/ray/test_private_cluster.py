"""A job in a Ray of its own: it starts, ends and dies without leaving anything on the machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepopt.cluster.process_table import descendants, wait_until_gone
from deepopt.errors import RunDirectoryError
from deepopt.head.supervisor import spawn_supervisor
from deepopt.telemetry.files import read_json
from support.ray_jobs import TESTS, RunningJob, write_run

pytestmark = pytest.mark.ray

GONE_TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    # Somebody else's, which a private one must leave alone.
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_NAMESPACE", "theirs")


@pytest.fixture
def temp_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders go; as short as Ray's sockets need it."""
    root = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(root))
    yield root
    shutil.rmtree(root)


def test_a_job_that_ends_leaves_no_process_and_no_folder(
    tmp_path: Path, temp_root: Path
) -> None:
    sections = {"training": {"steps": 20}, "logging": {"tensorboard": False}}
    job = RunningJob(write_run(tmp_path / "run", num_workers=1, job=sections))
    job.wait_for(lambda status: status["state"] == "running")
    supervisor = read_json(job.run.supervisor)
    assert Path(supervisor["ray_temp_dir"]).is_dir()
    assert supervisor["pid"] == job.pid
    below = descendants(job.pid)
    assert len(below) >= 5  # GCS, raylet, two agents, head, worker
    assert job.wait() == 0
    assert job.status["state"] == "finished"
    assert [p for p in below if p.is_alive()] == []
    assert list(temp_root.iterdir()) == []


def test_a_killed_supervisor_takes_everything_along(tmp_path: Path, temp_root: Path) -> None:
    sections = {"training": {"steps": 10_000}, "logging": {"tensorboard": False}}
    run = write_run(tmp_path / "run", num_workers=1, job=sections)
    job = RunningJob(run)
    job.wait_for(lambda status: status["step"] > 2)
    with pytest.raises(RunDirectoryError, match="in use by another launch or supervisor"):
        spawn_supervisor(run.root)
    assert job.status["state"] == "running"
    below = descendants(job.pid)
    folder = Path(read_json(run.supervisor)["ray_temp_dir"])
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert wait_until_gone(below, timeout_s=GONE_TIMEOUT_S) == []
    until_s = time.monotonic() + GONE_TIMEOUT_S
    while folder.exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    assert list(temp_root.iterdir()) == []

    job = RunningJob(run)
    job.wait_for(lambda status: status["generation"] == 2 and status["state"] == "running")
    job.request("kill")
    assert job.wait() == 130
    assert list(temp_root.iterdir()) == []


def test_a_job_file_that_cannot_be_read_ends_with_words_in_the_status(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_workers=1)
    run.job.write_text("trainin: {}\n")
    job = RunningJob(run)
    assert job.wait() == 1
    assert job.status["state"] == "failed"
    assert "job.yaml:1" in job.status["error"]["message"]
    assert job.events("error")[0]["exit_code"] == 1


@pytest.mark.parametrize("after_s", [0.0, 1.5])
def test_a_signal_while_the_cluster_starts_ends_the_job_as_stopped(
    tmp_path: Path, temp_root: Path, after_s: float
) -> None:
    job = RunningJob(write_run(tmp_path / "run", num_workers=1))
    time.sleep(after_s)  # before Python is up; while Ray starts
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 0
    assert job.status["state"] == "stopped"
    assert list(temp_root.iterdir()) == []
