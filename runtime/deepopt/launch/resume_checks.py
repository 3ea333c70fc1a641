"""What has to be true of a run directory before its job goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepopt.errors import RunDirectoryError
from deepopt.launch.run_view import ENDED, Supervisor, read_status, read_supervisor
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory


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
