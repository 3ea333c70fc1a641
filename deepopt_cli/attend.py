"""Starts the supervisor of a run and stays with the job until it ends; turns its end into words."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepopt.clock import SystemClock
from deepopt.errors import ClusterError
from deepopt.launch.follow import Follower, Interrupts, Outcome, View
from deepopt.launch.run_view import ENDED, Supervisor, read_status, read_supervisor
from deepopt.launch.start import start
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json
from deepopt_cli.output import EXIT_INTERRUPTED, say, say_json, show_error, tell
from deepopt_cli.views import JsonView, PlainView
from deepopt_cli.words import closing_lines, failure_details

if TYPE_CHECKING:
    from deepopt.config import JobConfig

SIGN_POLL_S = 0.02  # between two looks for that pid
SIGN_TIMEOUT_S = 10.0  # for a new supervisor to write its pid into the run directory
STATUS_BYTES = 64 << 10  # a status of tens of workers: with less room, none can be written
LOG_LINES = 20  # of a supervisor that died without a word


def detach(run: RunDirectory, *, shown_as: Path, json: bool, fresh: bool) -> int:
    """Start the supervisor and say how to find the job again.

    Args:
        run: the run directory, with job, model and plan in it.
        shown_as: the run directory as the user would type it.
        json: one JSON object instead of words.
        fresh: as for `start`.

    Returns:
        The exit code.

    Raises:
        DeepoptError: the supervisor cannot be started.
    """
    supervisor = start(run, fresh=fresh)
    if not _has_signed(run, supervisor, fresh=fresh):
        _show_vanished({}, run=run, supervisor=supervisor, shown_as=shown_as)
        return ClusterError.exit_code
    if json:
        say_json(
            {"state": "starting", "run_dir": str(run.root), "supervisor_pid": supervisor.pid}
        )
        return 0
    say(f"started in {shown_as}, supervisor pid {supervisor.pid}")
    say(f"  deepopt status {shown_as}")
    say(f"  deepopt logs -f {shown_as}")
    say(f"  deepopt stop {shown_as}")
    return 0


def _has_signed(run: RunDirectory, supervisor: Supervisor, *, fresh: bool) -> bool:
    """Wait until `status` and `stop` can find a supervisor; False when it died before.

    One that is gone again may have done its work: in a fresh run directory its last words say so.
    """
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + SIGN_TIMEOUT_S
    while supervisor.lives() and clock.monotonic_s() < deadline_s:
        found = read_supervisor(run)
        if found is not None and found.pid == supervisor.pid:
            return True
        time.sleep(SIGN_POLL_S)
    status = read_status(run) if fresh else None
    return bool(supervisor.lives()) or (status is not None and status.get("state") in ENDED)


def attend(
    run: RunDirectory, *, job: JobConfig, shown_as: Path, json: bool, fresh: bool
) -> int:
    """Start the supervisor, follow the job, say how it ended.

    Args:
        run: the run directory, with job, model and plan in it.
        job: for its name and how often steps are shown.
        shown_as: the run directory as the user would type it.
        json: JSON lines instead of words.
        fresh: as for `start`.

    Returns:
        The exit code.

    Raises:
        DeepoptError: the supervisor cannot be started.
    """
    with Interrupts() as interrupts:
        follower = Follower(run, interrupts=interrupts)
        supervisor = start(run, fresh=fresh)
        return _stay(follower, supervisor, run=run, job=job, shown_as=shown_as, json=json)


def attach(
    run: RunDirectory, *, supervisor: Supervisor, job: JobConfig, shown_as: Path, json: bool
) -> int:
    """Follow a job that runs already, say how it ended.

    Args:
        run: the run directory.
        supervisor: it lives.
        job: for its name and how often steps are shown.
        shown_as: the run directory as the user would type it.
        json: JSON lines instead of words.

    Returns:
        The exit code.
    """
    with Interrupts() as interrupts:
        follower = Follower(run, interrupts=interrupts)
        return _stay(follower, supervisor, run=run, job=job, shown_as=shown_as, json=json)


def _stay(
    follower: Follower,
    supervisor: Supervisor,
    *,
    run: RunDirectory,
    job: JobConfig,
    shown_as: Path,
    json: bool,
) -> int:
    view = _make_view(job, shown_as=shown_as, json=json)
    try:
        outcome = follower.follow(supervisor, view=view)
    except BrokenPipeError:
        tell(f"nobody reads the output any more; the job goes on: deepopt status {shown_as}")
        raise
    finally:
        view.close()
    code = exit_code_of(outcome)
    if json:
        last = outcome.status or {"state": "starting", "step": 0, "workers": []}
        ending = {"exit_code": code, "supervisor_alive": bool(supervisor.lives())}
        say_json({**last, **ending, "run_dir": str(run.root)})
    _show_end(outcome, run=run, supervisor=supervisor, shown_as=shown_as, json=json)
    return code


def exit_code_of(outcome: Outcome) -> int:
    """The exit code of a job that was followed to its end.

    Args:
        outcome: how following ended.
    """
    status = outcome.status or {}
    if not outcome.ended:
        killed = outcome.interrupts > 1
        return EXIT_INTERRUPTED if killed else ClusterError.exit_code
    if status["state"] == "stopped" and outcome.interrupts:
        return EXIT_INTERRUPTED
    return int(status.get("exit_code") or 0)


def _make_view(job: JobConfig, *, shown_as: Path, json: bool) -> View:
    if json:
        return JsonView()
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console

        from deepopt_cli.live import LiveView

        return LiveView(title=f"{job.name}  {shown_as}", console=Console())
    return PlainView(every=job.logging.every)


def _show_end(
    outcome: Outcome, *, run: RunDirectory, supervisor: Supervisor, shown_as: Path, json: bool
) -> None:
    status = outcome.status or {}
    resume = f"deepopt resume {shown_as}"
    if not outcome.ended:
        if outcome.interrupts > 1:
            tell(f"killed; go on from the last checkpoint with: {resume}")
            return
        _show_vanished(status, run=run, supervisor=supervisor, shown_as=shown_as)
    elif status["state"] == "failed":
        error: Mapping[str, Any] = status.get("error") or {"message": "the job failed"}
        show_error(
            str(error.get("message")),
            details=failure_details(error, logs=run.logs, exit_code=status.get("exit_code")),
            remedy=error.get("remedy") or f"correct the cause, then {resume}",
        )
    elif not json:
        report = read_json(run.report) if run.report.exists() else {}
        say()
        say("\n".join(closing_lines(status, report=report, run_dir=shown_as)))


def _show_vanished(
    status: Mapping[str, Any], *, run: RunDirectory, supervisor: Supervisor, shown_as: Path
) -> None:
    message = (
        f"the supervisor (pid {supervisor.pid}) is gone; the job was "
        f"{status.get('state', 'starting')} at step {status.get('step', 0)}"
    )
    remedy = f"deepopt resume {shown_as} goes on from the newest checkpoint"
    if _is_full(run.root):  # then logs and status end before the job did
        message += f"; no space is left on the disk of {shown_as}"
        remedy = f"make room there; then {remedy}"
    show_error(message, details=_last_lines(run.logs / "supervisor.log"), remedy=remedy)


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < STATUS_BYTES
    except OSError:
        return False


def _last_lines(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    if not lines:
        return ""
    return "\n".join([f"the end of {path}:", *(f"  {line}" for line in lines[-LOG_LINES:])])
