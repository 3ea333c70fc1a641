"""A run directory as the command line sees it: its status, and whether its supervisor lives.

Reads only; the one thing written is a request (`request`). Works on any run directory whose disk
can be seen, also when the job runs on another host; only then nobody here can tell whether its
supervisor lives.
"""

from __future__ import annotations

import signal
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deepopt.cluster.process_table import Process, descendants
from deepopt.errors import RunDirectoryError
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json, write_json_atomic

ENDED = frozenset({"stopped", "finished", "failed"})
KILL_TIMEOUT_S = 10.0  # for what is below a supervisor to be gone after SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervisor:
    """The process that owns the Ray of a run.

    Args:
        process: None when it was gone before it could be looked at.
        pid: its process id.
        host: host name.
    """

    process: Process | None
    pid: int
    host: str

    def lives(self) -> bool | None:
        """Whether it runs; None when it is on another host."""
        if self.host != socket.gethostname():
            return None
        return self.process is not None and self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL to it and to everything below it; fine when it is gone or on another host."""
        if not self.lives():
            return
        assert self.process is not None, "a supervisor that lives has been seen"
        self.process.send(signal.SIGSTOP)  # or it would start what is killed below it anew
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        while (below := descendants(self.pid)) and time.monotonic() < deadline_s:
            for process in below:
                process.send(signal.SIGKILL)
            time.sleep(0.02)
        self.process.send(signal.SIGKILL)


def open_run(path: Path) -> RunDirectory:
    """The run directory at a path.

    Raises:
        RunDirectoryError: there is none.
    """
    run = RunDirectory(path.absolute())
    if not path.exists():
        raise RunDirectoryError(
            f"run directory {path} does not exist", remedy=_suggest_runs(path.parent)
        )
    if not run.job.is_file():
        raise RunDirectoryError(
            f"{path} is not a run directory: it has no {run.job.name}",
            remedy=_suggest_runs(path if path.is_dir() else path.parent),
        )
    return run


def read_status(run: RunDirectory) -> dict[str, Any] | None:
    """The content of `status.json`; None before the head has written one.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    return read_json(run.status) if run.status.exists() else None


def read_supervisor(run: RunDirectory) -> Supervisor | None:
    """The supervisor that last claimed the run; None when none ever did.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    if not run.supervisor.exists():
        return None
    content = read_json(run.supervisor)
    try:
        pid = int(content["pid"])
        process = Process(pid, int(content["start_time"]))
        return Supervisor(process=process, pid=pid, host=str(content["host"]))
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{run.supervisor} lacks pid, start_time or host",
            remedy="the file was damaged or written by something else; move it away",
        ) from error


def request(run: RunDirectory, **fields: object) -> None:
    """Put a request to the head into the run directory.

    Args:
        run: the run directory.
        fields: for example `kind="stop", checkpoint=True`.
    """
    write_json_atomic(run.requests / f"{uuid.uuid4().hex}.json", fields)


def status_age_s(status: dict[str, Any]) -> float | None:
    """Seconds since a status was written; None when it does not say."""
    try:
        written = datetime.fromisoformat(str(status["updated_at"]))
    except (KeyError, ValueError):
        return None
    return max(0.0, (datetime.now(tz=UTC) - written).total_seconds())


def _suggest_runs(folder: Path) -> str:
    """Name the newest run directories near a wrong path."""
    try:
        found = [p.parent for p in folder.glob("*/job.yaml")]
        found += [p.parent for p in folder.glob("runs/*/job.yaml")]
        newest = sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)[:3]
    except OSError:
        newest = []
    if not newest:
        return "give the folder that `deepopt launch` printed"
    return f"near it there is {', '.join(map(str, newest))}"
