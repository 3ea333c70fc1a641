import json
import os
from pathlib import Path

import pytest

from deepopt.errors import ClusterError, RunDirectoryError
from deepopt.head.journal import Journal
from deepopt.head.run_lock import lock_run_directory
from deepopt.head.state import JobState
from deepopt.head.supervision import (
    end_without_head,
    job_id_of,
    show_starting,
    take_requests,
)
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json, read_json_lines, write_json_atomic


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_a_run_directory_has_one_supervisor_as_long_as_it_lives(tmp_path: Path) -> None:
    lock = lock_run_directory(tmp_path)
    with pytest.raises(RunDirectoryError, match="in use by another launch or supervisor"):
        lock_run_directory(tmp_path)
    os.close(lock)
    os.close(lock_run_directory(tmp_path))


def test_a_missing_run_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No such file"):
        lock_run_directory(tmp_path / "none")


def test_a_job_keeps_its_id(run: RunDirectory) -> None:
    assert job_id_of(run, name="job") != job_id_of(run, name="job")
    with Journal(run.journal) as journal:
        journal.append("job", job_id="job-42")
    assert job_id_of(run, name="renamed") == "job-42"


def test_requests_are_taken_once_and_strange_ones_are_dropped(run: RunDirectory) -> None:
    run.requests.mkdir()
    for name, content in (
        ("1", '{"kind": "stop", "checkpoint": true}'),
        ("2", '{"kind": "dance"}'),
        ("3", "garbage"),
        ("4", '{"kind": "kill"}'),
    ):
        (run.requests / f"{name}.json").write_text(content)
    (run.requests / "5.json.tmp").write_text("not renamed yet")
    assert take_requests(run) == ["stop", "kill"]
    assert take_requests(run) == []
    assert [path.name for path in run.requests.iterdir()] == ["5.json.tmp"]


def test_without_requests_nothing_is_needed(run: RunDirectory) -> None:
    assert take_requests(run) == []


def test_an_end_without_a_head_is_written_everywhere(run: RunDirectory) -> None:
    error = ClusterError("no room", remedy="make some")
    end_without_head(run, state=JobState.FAILED, exit_code=3, error=error)
    status = read_json(run.status)
    assert (status["state"], status["exit_code"], status["workers"]) == ("failed", 3, [])
    assert status["error"]["message"] == "no room"
    assert status["error"]["culprit"] is None
    assert [event["kind"] for event in read_json_lines(run.events)] == ["error", "state"]
    assert json.loads(run.journal.read_text())["state"] == "failed"


def test_a_new_start_hides_the_end_before_and_keeps_the_progress(run: RunDirectory) -> None:
    write_json_atomic(
        run.status, {"state": "failed", "exit_code": 4, "error": {"message": "x"}, "step": 7}
    )
    show_starting(run)
    status = read_json(run.status)
    assert (status["state"], status["exit_code"], status["error"]) == ("starting", None, None)
    assert status["step"] == 7
