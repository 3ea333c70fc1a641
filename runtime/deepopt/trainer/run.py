"""One run of a trainer: its directory made, its job started, followed, and its end taken."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepopt.config import JobConfig
from deepopt.errors import (
    ClusterError,
    DeepoptError,
    InputError,
    RunDirectoryError,
    TrainingError,
    WorkersLostError,
)
from deepopt.launch.follow import Follower, Interrupts, Outcome, View
from deepopt.launch.preparation import Prepared, prepare, with_absolute_paths
from deepopt.launch.run_files import make_run_directory, refuse_used, write_launch, write_plan
from deepopt.launch.run_view import Supervisor
from deepopt.launch.start import start
from deepopt.run_directory import RunDirectory

_LOG_LINES = 20
_BY_EXIT_CODE: Mapping[int, type[DeepoptError]] = {
    kind.exit_code: kind for kind in (InputError, ClusterError, WorkersLostError, TrainingError)
}


def open_new(path: Path, make_job: Callable[[RunDirectory], JobConfig]) -> RunDirectory:
    """Make a run directory; it appears whole or not at all.

    Args:
        path: new or empty.
        make_job: writes what the script brings along into it, and says the job.

    Raises:
        DeepoptError: the job is wrong, or the folder cannot be written.
    """
    refuse_used(path)
    run = RunDirectory(path.absolute())
    try:
        run.carried.mkdir(parents=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write run directory {path}: {error.strerror}", remedy="name another folder"
        ) from error
    try:
        prepared = prepare(with_absolute_paths(make_job(run)), plan_id=1)
        make_run_directory(run.root, prepared, import_roots=import_roots())
    except BaseException:
        shutil.rmtree(run.root, ignore_errors=True)
        raise
    return run


def renew(run: RunDirectory, prepared: Prepared) -> None:
    """Write a job that goes on into its run directory.

    Args:
        run: of the job.
        prepared: the job as it goes on.
    """
    write_launch(run, import_roots=import_roots())
    write_plan(run, prepared)


def follow(run: RunDirectory, *, view: View, fresh: bool) -> tuple[Outcome, Supervisor]:
    """Start the supervisor of a run and stay until the job has ended. Ctrl-C once stops it with a
    checkpoint, twice kills it.

    Args:
        run: the run directory, with job, model and plan in it.
        view: is told what happens.
        fresh: as for `launch.start.start`.

    Raises:
        DeepoptError: the supervisor cannot be started.
    """
    with Interrupts() as interrupts:
        follower = Follower(run, interrupts=interrupts)
        with _exported(import_roots()):
            supervisor = start(run, fresh=fresh)
        return follower.follow(supervisor, view=view), supervisor


def raise_failure(outcome: Outcome, *, run: RunDirectory, supervisor: Supervisor) -> None:
    """Raise what ended a job badly; nothing for one that finished or was stopped.

    Args:
        outcome: how following ended.
        run: the run directory.
        supervisor: of the job.

    Raises:
        KeyboardInterrupt: it was killed by Ctrl-C.
        DeepoptError: it failed; the culprit's traceback is a note of the error.
    """
    status = outcome.status or {}
    if not outcome.ended:
        if outcome.interrupts > 1:
            raise KeyboardInterrupt
        error: DeepoptError = ClusterError(
            f"the supervisor (pid {supervisor.pid}) is gone; the job was "
            f"{status.get('state', 'starting')} at step {status.get('step', 0)}",
            remedy=f"trainer.fit(..., resume_from={str(run.root)!r}) goes on from the newest "
            "checkpoint",
        )
        error.add_note(_last_lines(run.logs / "supervisor.log"))
        raise _with_hint(error)
    if status.get("state") == "failed":
        told: Mapping[str, Any] = status.get("error") or {}
        kind = _BY_EXIT_CODE.get(int(status.get("exit_code") or 1), DeepoptError)
        error = kind(
            str(told.get("message", "the job failed")), remedy=str(told.get("remedy") or "")
        )
        if trace := (told.get("culprit") or {}).get("traceback"):
            error.add_note(f"in the worker:\n{trace}")
        error.add_note(f"logs: {run.logs}")
        raise _with_hint(error)


def import_roots() -> list[Path]:
    """Folders that this process imports from and a fresh interpreter would not."""
    own = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    roots = [Path(entry or ".").absolute() for entry in sys.path]
    return [
        root
        for root in dict.fromkeys(roots)
        if root.is_dir() and not any(str(root).startswith(prefix) for prefix in own)
    ]


@contextmanager
def _exported(roots: Sequence[Path]) -> Iterator[None]:
    """Let the processes of the job import from some folders, too."""
    before = os.environ.get("PYTHONPATH")
    parts = [*map(str, roots), *([before] if before else [])]
    os.environ["PYTHONPATH"] = os.pathsep.join(parts)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _with_hint(error: DeepoptError) -> DeepoptError:
    if error.remedy:
        error.add_note(f"hint: {error.remedy}")
    return error


def _last_lines(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"there is no {path}"
    return "\n".join([f"the end of {path}:", *(f"  {line}" for line in lines[-_LOG_LINES:])])
