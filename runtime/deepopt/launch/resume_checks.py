"""What has to be true of a run directory before its job goes on."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepopt.config import JobConfig
from deepopt.errors import PlanError, RunDirectoryError
from deepopt.launch.run_view import ENDED, Supervisor, read_status, read_supervisor
from deepopt.planner.decide import make_plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory

# What a job file may say of stages and order, and what leaves it to the planner.
_FREE_CHOICES: Mapping[str, str] = {
    "pipeline.schedule": "auto",
    "pipeline.boundaries": "null",
    "pipeline.placement": "auto",
    "parallel.pipeline": "null",
}


def refuse_incomplete(run: RunDirectory, shown_as: Path) -> None:
    """Check that everything a launch writes is there.

    Args:
        run: the run directory.
        shown_as: it as the user would type it.

    Raises:
        RunDirectoryError: a file is missing.
    """
    missing = [path.name for path in (run.model, run.plan) if not path.is_file()]
    if missing:
        raise RunDirectoryError(
            f"run directory {shown_as} lacks {' and '.join(missing)}",
            remedy=f"it was damaged; start anew with: deepopt launch {shown_as / run.job.name}",
        )


def find_alive(
    run: RunDirectory, shown_as: Path, *, changes: Sequence[str]
) -> Supervisor | None:
    """The supervisor of a job that runs already: it is joined, not started again.

    Args:
        run: the run directory.
        shown_as: it as the user would type it.
        changes: what the user wants to be different, which a running job cannot take.

    Returns:
        None when it does not run.

    Raises:
        RunDirectoryError: it runs and is wanted different, or nobody here can tell.
    """
    supervisor = read_supervisor(run)
    if supervisor is None:
        return None
    alive = supervisor.lives()
    state = (read_status(run) or {}).get("state", "starting")
    if alive and changes:
        raise RunDirectoryError(
            f"the job in {shown_as} is {state}: supervisor pid {supervisor.pid} lives, and cannot "
            f"take {', '.join(changes)} while it does",
            remedy=f"end it with deepopt stop {shown_as} first; without changes, resume joins it",
        )
    if alive is None and state not in ENDED:
        raise RunDirectoryError(
            f"the job in {shown_as} is recorded as {state} on host {supervisor.host}, which "
            "cannot be looked at from here",
            remedy=f"resume on {supervisor.host}; if that host is gone, remove {run.supervisor}",
        )
    return supervisor if alive else None


def refuse_other_model(saved: ModelSkeleton, now: ModelSkeleton, *, shown_as: Path) -> None:
    """Check that the model is the one that a run was launched with.

    Args:
        saved: what the run directory says.
        now: what the code makes now.
        shown_as: the run directory as the user would type it.

    Raises:
        RunDirectoryError: it is another; says where it differs first.
    """
    if saved.fingerprint() == now.fingerprint():
        return
    raise RunDirectoryError(
        f"the model is not the one that {shown_as} was launched with: "
        f"{_first_difference(saved, now)}",
        remedy=f"restore the code of {saved.factory}, or launch a new job",
    )


def _first_difference(saved: ModelSkeleton, now: ModelSkeleton) -> str:
    if len(saved.layers) != len(now.layers):
        return f"it had {len(saved.layers)} layers and has {len(now.layers)}"
    for before, after in zip(saved.layers, now.layers, strict=True):
        if before.name != after.name:
            return f"layer {before.name} is now {after.name}"
        old = {p.name: p for p in before.parameters}
        new = {p.name: p for p in after.parameters}
        for name in [*old, *new]:
            if name not in new or name not in old:
                return f"parameter {name} is {'gone' if name in old else 'new'}"
            if old[name].shape != new[name].shape:
                return (
                    f"{name} had shape {list(old[name].shape)} and has {list(new[name].shape)}"
                )
            if old[name].tied_to != new[name].tied_to:
                return f"{name} was tied to {old[name].tied_to}, is tied to {new[name].tied_to}"
    return "parameters stand in another order"


def say_what_to_free(
    error: PlanError,
    job: JobConfig,
    *,
    skeleton: ModelSkeleton,
    overrides: Sequence[str],
    shown_as: Path,
) -> PlanError:
    """The same error, whose next step frees what the job chose before and does not fit any more.

    What was chosen at the launch may not fit what is asked for now: an order for other stages, cuts for
    another number of workers. It is the user's choice, so it is not dropped in silence.

    Args:
        error: no plan fits.
        job: with what is asked for now.
        skeleton: its model.
        overrides: `KEY=VALUE` asked for now, those of `--workers` and `--steps` included.
        shown_as: the run directory as the user would type it.

    Returns:
        The error itself where nothing of the kind would help.
    """
    asked = {override.partition("=")[0].strip() for override in overrides}
    old = {
        key: chosen
        for key, free in _FREE_CHOICES.items()
        if (chosen := _value_of(job, key)) not in (free, None) and key not in asked
    }
    for count in range(1, len(old) + 1):
        for keys in itertools.combinations(old, count):
            if not _fits(_freed(job, keys), skeleton):
                continue
            named = " and ".join(f"{key} {_as_text(old[key])}" for key in keys)
            changes = [*overrides, *(f"{key}={_FREE_CHOICES[key]}" for key in keys)]
            options = " ".join(f"--set {shlex.quote(change)}" for change in changes)
            return PlanError(
                error.message,
                remedy=f"{named} is what the job was launched with; to let it be chosen anew: "
                f"deepopt resume {shlex.quote(str(shown_as))} {options}",
            )
    return error


def _value_of(job: JobConfig, key: str) -> Any:
    section, field = key.split(".")
    return getattr(getattr(job, section), field)


def _as_text(chosen: Any) -> str:
    return str(list(chosen) if isinstance(chosen, tuple) else chosen)


def _freed(job: JobConfig, keys: Sequence[str]) -> JobConfig:
    for key in keys:
        section, field = key.split(".")
        free = None if _FREE_CHOICES[key] == "null" else _FREE_CHOICES[key]
        changed = getattr(job, section).model_copy(update={field: free})
        job = job.model_copy(update={section: changed})
    return job


def _fits(job: JobConfig, skeleton: ModelSkeleton) -> bool:
    """Whether there is a plan at all: with estimated costs, and hardly any search."""
    workers = job.worker.count
    assert workers is not None, "a job that was launched knows its number of workers"
    try:
        make_plan(job, skeleton, num_workers=workers, plan_id=0, effort=1)
    except PlanError:
        return False
    return True
