"""One run of a trainer: its directory made, its job started, followed, and its end taken."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepopt.checkpoint.verification import Found
from deepopt.config import JobConfig
from deepopt.errors import (
    ClusterError,
    DeepoptError,
    InputError,
    RunDirectoryError,
    TrainingError,
    WorkersLostError,
)
from deepopt.job_file import load_job
from deepopt.launch.follow import Follower, Interrupts, Outcome, View
from deepopt.launch.preparation import prepare, with_absolute_paths
from deepopt.launch.resume_checks import (
    find_alive,
    refuse_incomplete,
    refuse_other_model,
)
from deepopt.launch.run_files import (
    fill_run_directory,
    new_run_directory,
    refuse_used,
    write_launch,
    write_plan,
)
from deepopt.launch.run_view import Supervisor, open_run
from deepopt.launch.start import start
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json
from deepopt.trainer.checkpoints import copy_checkpoint

_LOG_LINES = 20
_BY_EXIT_CODE: Mapping[int, type[DeepoptError]] = {
    kind.exit_code: kind for kind in (InputError, ClusterError, WorkersLostError, TrainingError)
}


def open_new(
    path: Path, make_job: Callable[[Path], JobConfig], *, begin_with: Found | None = None
) -> RunDirectory:
    """Make a run directory; it appears whole or not at all.

    Args:
        path: new or empty.
        make_job: writes what the script brings along into a folder, and says the job.
        begin_with: a checkpoint to go on from, linked or copied; None: the model's own weights.

    Raises:
        DeepoptError: the job is wrong, or the folder cannot be written.
    """
    refuse_used(path)
    with new_run_directory(path) as run:
        folder = _make_carried(run, plan_id=1)
        prepared = prepare(with_absolute_paths(make_job(folder)), plan_id=1)
        if begin_with is not None:
            root = run.checkpoint_root(prepared.job.checkpoint.directory)
            copy_checkpoint(begin_with, root, linked=True)
        fill_run_directory(run, prepared, import_roots=import_roots())
    return run


def renew(path: Path, make_job: Callable[[Path], JobConfig]) -> RunDirectory:
    """Write a job that goes on into its run directory, which stays as it is where that fails.

    Args:
        path: of a run that is not running.
        make_job: writes what the script brings along into a folder, and says the job.

    Raises:
        DeepoptError: the run is running or damaged, or the job is not the one that it was.
    """
    run = open_run(path)
    refuse_incomplete(run, path)
    find_alive(run, path, changes=("what this script asks for",))
    before = load_job(run.job)
    plan_id = Plan.from_json(read_json(run.plan)).plan_id + 1
    folder = _make_carried(run, plan_id=plan_id)
    try:
        job = with_absolute_paths(going_on(before, make_job(folder), path=path))
        prepared = prepare(job, plan_id=plan_id, run=run)
        saved = ModelSkeleton.from_json(read_json(run.model))
        refuse_other_model(saved, prepared.skeleton, shown_as=path)
        write_launch(run, import_roots=import_roots())
        write_plan(run, prepared)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def going_on(before: JobConfig, job: JobConfig, *, path: Path) -> JobConfig:
    """A job whose losses are those of the one before.

    Args:
        before: the job as its run directory has it.
        job: as the script says it now.
        path: of the run directory, as the user wrote it.

    Raises:
        InputError: something differs that decides the numbers.
    """
    if job.training.groups is None:
        training = job.training.model_copy(update={"groups": before.training.groups})
        job = job.model_copy(update={"training": training})
    for section in ("training", "precision"):
        old, new = getattr(before, section), getattr(job, section)
        for key in type(old).model_fields:
            if key != "steps" and getattr(old, key) != getattr(new, key):
                raise InputError(
                    f"resume_from={str(path)!r}: {section}.{key} was {getattr(old, key)!r} and is "
                    f"{getattr(new, key)!r} now: the losses would not be those of one run",
                    remedy=f"give {key} as before, or start a new run from its weights: trainer.load()",
                )
    return job


def _make_carried(run: RunDirectory, *, plan_id: int) -> Path:
    folder = run.carried / str(plan_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write run directory {run.root}: {error.strerror}",
            remedy="name another folder",
        ) from error
    return folder


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
