"""Makes a run directory and writes into it what a launch decided: job, model, plan, orders."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

from deepopt.clock import utc_now
from deepopt.config import JobConfig
from deepopt.errors import RunDirectoryError
from deepopt.head.run_lock import LOCK_NAME, lock_run_directory
from deepopt.job_file import dump_job
from deepopt.launch.preparation import Prepared, given_order_path
from deepopt.planner.decide import FILE
from deepopt.planner.orders import write_orders
from deepopt.run_directory import RunDirectory
from deepopt.schedule.csv_order import to_csv
from deepopt.telemetry.files import read_json, write_json_atomic, write_text_atomic


def new_run_path(job_name: str) -> Path:
    """A new name under `runs/`.

    Args:
        job_name: its first part.
    """
    stamp = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{job_name}-{stamp}-{secrets.token_hex(2)}"


def refuse_used(path: Path) -> None:
    """Check that a new run directory can be made at a path.

    Raises:
        RunDirectoryError: something is there.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise RunDirectoryError(f"run directory {path} is a file", remedy="name a new folder")
    if RunDirectory(path).job.exists():
        raise RunDirectoryError(
            f"run directory {path} holds a job already",
            remedy=f"deepopt resume {path} goes on with it; a new job needs a new folder",
        )
    if any(entry.name != LOCK_NAME for entry in path.iterdir()):
        raise RunDirectoryError(
            f"run directory {path} is not empty", remedy="name a new or an empty folder"
        )


@contextmanager
def new_run_directory(path: Path) -> Iterator[RunDirectory]:
    """A run directory to fill; it appears whole or not at all, and of two that want it one gets it.

    Args:
        path: new or empty.

    Raises:
        RunDirectoryError: something is there, another launch fills it, or it cannot be written.
    """
    run = RunDirectory(path.absolute())
    with _writing(path):
        run.root.mkdir(parents=True, exist_ok=True)
    lock = lock_run_directory(run.root)
    try:
        refuse_used(path)
        try:
            yield run
        except BaseException:
            shutil.rmtree(run.root, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def make_run_directory(
    path: Path, prepared: Prepared, *, import_roots: Sequence[Path]
) -> RunDirectory:
    """Make a run directory that a supervisor can be started on; it appears whole or not at all.

    Args:
        path: new or empty.
        prepared: the job.
        import_roots: folders where the job's import paths start.

    Raises:
        RunDirectoryError: as `new_run_directory`.
    """
    with new_run_directory(path) as run:
        fill_run_directory(run, prepared, import_roots=import_roots)
    return run


def fill_run_directory(
    run: RunDirectory, prepared: Prepared, *, import_roots: Sequence[Path]
) -> None:
    """Write what a supervisor can be started on.

    Args:
        run: a new run directory.
        prepared: the job.
        import_roots: folders where the job's import paths start.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    with _writing(run.root):
        write_launch(run, import_roots=import_roots)
        _write_plan(run, prepared)


@contextmanager
def _writing(path: Path, *, remedy: str = "name another folder") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write run directory {path}: {error.strerror}", remedy=remedy
        ) from error


def write_launch(run: RunDirectory, *, import_roots: Sequence[Path]) -> None:
    """Say where and with which version a job is launched.

    Args:
        run: the run directory; exists.
        import_roots: folders where the job's import paths start.
    """
    content = {
        "import_roots": [str(root) for root in import_roots],
        "command": sys.argv,
        "version": _version(),
        "time": utc_now(),
    }
    write_json_atomic(run.launch, content, durable=True)


def _version() -> str:
    try:
        return metadata.version("deepopt-cuda")
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def launch_roots(run: RunDirectory) -> list[Path]:
    """Folders where the job's import paths started; nothing for a run that does not say.

    Args:
        run: the run directory.
    """
    if not run.launch.is_file():
        return []
    content = read_json(run.launch)
    roots = content.get("import_roots", [content.get("import_root")])  # older runs: one
    return [Path(root) for root in roots if isinstance(root, str)]


def write_plan(run: RunDirectory, prepared: Prepared) -> None:
    """Write model, plan and job into the run directory of a job that goes on, durably.

    Args:
        run: the run directory.
        prepared: the job.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    with _writing(
        run.root, remedy="make it writable, and make room on its disk, to go on there"
    ):
        _write_plan(run, prepared)


def _write_plan(run: RunDirectory, prepared: Prepared) -> None:
    planned = prepared.planned
    if prepared.plan_file is None:
        run.plan_file.unlink(missing_ok=True)  # of an earlier plan
    elif prepared.plan_file != run.plan_file:
        text = prepared.plan_file.read_text(encoding="utf-8-sig")
        write_text_atomic(run.plan_file, text, durable=True)
    write_orders(run.schedules, orders=planned.orders)
    write_json_atomic(run.costs, planned.costs.to_json(), durable=True)
    if prepared.prediction is None:
        run.prediction.unlink(missing_ok=True)  # of an earlier plan
    else:
        content = {**prepared.prediction.to_json(), "plan": prepared.plan.fingerprint()}
        write_json_atomic(run.prediction, content, durable=True)
    write_json_atomic(run.model, prepared.skeleton.to_json(), durable=True)
    write_json_atomic(run.plan, prepared.plan.to_json(), durable=True)
    # Last: a folder with a job in it is a run directory.
    write_text_atomic(run.job, dump_job(_with_own_order(run, prepared)), durable=True)


def _with_own_order(run: RunDirectory, prepared: Prepared) -> JobConfig:
    """The job; an order that it brings along is kept in the run directory, to resume from there."""
    job, planned = prepared.job, prepared.planned
    if given_order_path(job) is None:
        return job
    kept = run.schedules / planned.plan.orders[0] / f"{planned.plan.schedule}.csv"
    kept.parent.mkdir(exist_ok=True)
    write_text_atomic(kept, to_csv(planned.schedules[0], transfers=False), durable=True)
    pipeline = job.pipeline.model_copy(update={"schedule": f"{FILE}{kept}"})
    return job.model_copy(update={"pipeline": pipeline})
