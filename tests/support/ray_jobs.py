"""Jobs with fake stage workers and real processes: run directories, supervisors, clusters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepopt.cluster.process_table import Process, descendants, find_process, wait_until_gone
from deepopt.cluster.ray_node import remove_temp_dir
from deepopt.config import JobConfig
from deepopt.head.supervisor import spawn_supervisor
from deepopt.job_file import dump_job
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json, read_json_lines, write_json_atomic
from support.head_fakes import make_plan, make_skeleton

STAGE_WORKER = "support.ray_stage_worker:FakeStageWorker"
TESTS = Path(__file__).parents[1]
TIMEOUT_S = 90.0  # for anything in these tests; ten times what it takes on a loaded machine


def write_run(
    root: Path, *, num_workers: int, job: Mapping[str, Any] | None = None
) -> RunDirectory:
    """A run directory that can be launched."""
    config = JobConfig.model_validate({"name": "test", **(job or {})})
    run = RunDirectory(root)
    root.mkdir(parents=True, exist_ok=True)
    run.job.write_text(dump_job(config))
    write_json_atomic(run.model, make_skeleton().to_json())
    write_json_atomic(run.plan, make_plan(pipeline_size=num_workers).to_json())
    return run


class RunningJob:
    """A job whose supervisor this process has started.

    Args:
        run: its run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.pid = spawn_supervisor(run.root, stage_worker=STAGE_WORKER)
        found = find_process(self.pid)
        assert found is not None
        self.process: Process = found
        self._code: int | None = None

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.run.status)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_json_lines(self.run.events) if e["kind"] == kind]

    def wait_for(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until the status is as wanted."""
        until_s = time.monotonic() + TIMEOUT_S
        while not what(status := self.status):
            assert self._poll() is None, self._story(f"it ended at {status['state']}")
            assert time.monotonic() < until_s, self._story("it took too long")
            time.sleep(0.05)
        return status

    def wait(self) -> int:
        """Wait for the supervisor's end; its exit code."""
        until_s = time.monotonic() + TIMEOUT_S
        while (code := self._poll()) is None:
            assert time.monotonic() < until_s, self._story("it did not end")
            time.sleep(0.05)
        return code

    def request(self, kind: str) -> None:
        """Ask for something as the command line does."""
        write_json_atomic(self.run.requests / f"{kind}.json", {"kind": kind})

    def _poll(self) -> int | None:
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def _story(self, headline: str) -> str:
        logs = [f"--- {p.name}\n{p.read_text()}" for p in sorted(self.run.logs.iterdir())]
        return "\n".join([headline, json.dumps(self.status), *logs])


@contextmanager
def foreign_ray(*, slots: int) -> Iterator[dict[str, str]]:
    """Somebody else's Ray on this machine.

    Yields:
        Environment of a process that may join it, and `ADDRESS`.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "support.ray_host", str(slots)],
        cwd=TESTS,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            environment = json.loads(process.stdout.readline())
            del environment["TEMP_DIR"]
            yield environment
        finally:
            process.stdin.close()  # it ends with this
            process.wait(timeout=TIMEOUT_S)


class FurtherHost:
    """A further host of a foreign Ray, until its power is cut.

    Args:
        environment: what `foreign_ray` gave.
        slots: CPU slots that it adds.
    """

    def __init__(self, environment: Mapping[str, str], *, slots: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.ray_host", str(slots), environment["ADDRESS"]],
            cwd=TESTS,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._temp_dir = Path(json.loads(self._process.stdout.readline())["TEMP_DIR"])

    def has(self, pid: int) -> bool:
        """Whether a process runs there."""
        return any(one.pid == pid for one in descendants(self._process.pid))

    def cut_power(self) -> None:
        """SIGKILL to all that runs there; nobody there can clean up any more."""
        doomed = descendants(self._process.pid)
        self._process.kill()
        for one in doomed:
            one.send(signal.SIGKILL)
        self._process.communicate()
        wait_until_gone(doomed, timeout_s=TIMEOUT_S)
        assert remove_temp_dir(self._temp_dir)
