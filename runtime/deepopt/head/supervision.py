"""What the supervisor writes and reads in a run directory: itself, requests, an end without a head.

Nothing here needs Ray; `deepopt.head.supervisor` has the process.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepopt.clock import utc_now
from deepopt.cluster.process_table import Process
from deepopt.errors import DeepoptError, RunDirectoryError
from deepopt.head.journal import Journal, read_journal, replay
from deepopt.head.state import JobState
from deepopt.run_directory import RunDirectory
from deepopt.telemetry import events
from deepopt.telemetry.files import JsonLinesWriter, read_json, write_json_atomic

logger = logging.getLogger(__name__)

KINDS = ("stop", "kill", "checkpoint")

_EMPTY_STATUS: dict[str, Any] = {
    "job_id": "",
    "name": "",
    "state": "",
    "step": 0,
    "last_step": 0,
    "generation": 0,
    "plan_id": 0,
    "exit_code": None,
    "error": None,
    "workers": [],
    "loss": None,
    "tokens_per_s": None,
    "tokens_per_s_per_worker": None,
    "mfu": None,
    "eta_s": None,
    "prediction_error": None,
    "warm_up_share": None,
    "stage_busy": {},
    "bubble": None,
    "restarts": 0,
    "workers_wanted": 0,
    "faults": [],
    "checkpoint_step": 0,
    "placement": "",
    "schedule": "",
    "updated_at": "",
    "supervisor_pid": 0,
}


def job_id_of(run: RunDirectory, *, name: str) -> str:
    """The id of the job in a run directory: the journal's, or a new one.

    Args:
        run: the run directory.
        name: the job's name, the first part of a new id.

    Raises:
        RunDirectoryError: the journal is damaged.
    """
    return replay(read_journal(run.journal).entries).job_id or f"{name}-{secrets.token_hex(4)}"


def write_supervisor(
    run: RunDirectory, *, process: Process, job_id: str, temp_dir: Path | None
) -> None:
    """Say who the supervisor is and where its Ray lies; the namespace is the job's id."""
    content = {
        "pid": process.pid,
        "start_time": process.start_time,
        "host": socket.gethostname(),
        "ray_temp_dir": None if temp_dir is None else str(temp_dir),
        "job_id": job_id,
        "namespace": job_id,
    }
    write_json_atomic(run.supervisor, content, durable=True)


def leftover_temp_dir(run: RunDirectory) -> Path | None:
    """The Ray folder of an earlier supervisor of this run on this host; None when it is gone."""
    try:
        content = read_json(run.supervisor)
    except RunDirectoryError:
        return None
    folder = content.get("ray_temp_dir")
    if content.get("host") != socket.gethostname() or not isinstance(folder, str):
        return None
    return Path(folder) if Path(folder).is_dir() else None


def take_requests(run: RunDirectory) -> list[str]:
    """Read and remove the requests that lie in the run directory.

    Returns:
        Their kinds: `stop`, `kill` or `checkpoint`; others are left out with a warning.
    """
    kinds = []
    try:
        if not os.listdir(run.requests):  # noqa: PTH208 - ten times a second, and nearly always empty
            return []
    except FileNotFoundError:
        return []
    for path in sorted(run.requests.glob("*.json")):
        try:
            kind = read_json(path).get("kind")
        except RunDirectoryError as error:
            kind = error.message
        with suppress(FileNotFoundError):
            path.unlink()
        if kind in KINDS:
            kinds.append(kind)
        else:
            logger.warning("request %s is not understood: %s", path.name, kind)
    return kinds


def show_starting(run: RunDirectory) -> None:
    """Let the status say `starting`, so that nobody takes an earlier launch's end for this one's."""
    _change_status(
        run,
        {
            "state": str(JobState.STARTING),
            "exit_code": None,
            "error": None,
            "workers": [],
            "supervisor_pid": 0,
        },
    )


def end_without_head(
    run: RunDirectory, *, state: JobState, exit_code: int, error: DeepoptError | None
) -> None:
    """Write down how the job ended when there is no head to do it.

    Args:
        run: the run directory.
        state: stopped or failed.
        exit_code: of the job.
        error: what went wrong; None when nothing did.
    """
    shown: dict[str, Any] | None = None
    if error is not None:
        shown = {
            "message": error.message,
            "remedy": error.remedy,
            "culprit": None,
            "victims": [],
        }
    try:
        with Journal(run.journal) as journal:
            journal.append("state", state=str(state), exit_code=exit_code)
    except DeepoptError as trouble:
        logger.warning("%s", trouble.message)
    try:
        with JsonLinesWriter(run.events) as lines:
            if error is not None:
                failed = events.Failed(
                    message=error.message, remedy=error.remedy, exit_code=exit_code
                )
                lines.write(failed.to_json())
            reason = "" if error is None else error.message
            lines.write(events.StateChanged(state=str(state), reason=reason).to_json())
        _change_status(
            run,
            {"state": str(state), "exit_code": exit_code, "error": shown, "workers": []},
        )
    except OSError as trouble:
        logger.warning("cannot write in %s: %s", run.root, trouble)


def _change_status(run: RunDirectory, changes: Mapping[str, Any]) -> None:
    try:
        before = read_json(run.status)
    except RunDirectoryError:
        before = {}
    write_json_atomic(
        run.status, {**_EMPTY_STATUS, **before, **changes, "updated_at": utc_now()}
    )
