"""Checkpoints as a script handles them: found by any path, copied, read back into the user's own model."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch

from deepopt.checkpoint import folders
from deepopt.checkpoint.layer_files import read_keys
from deepopt.checkpoint.store import CheckpointStore
from deepopt.checkpoint.verification import Found, verify
from deepopt.errors import CheckpointError
from deepopt.job_file import load_job
from deepopt.run_directory import RunDirectory


def find_checkpoint(path: Path) -> Found:
    """The newest checkpoint at a path whose every byte is as it was written.

    Args:
        path: a run directory, a folder that `DeepTrainer.save` wrote, or a checkpoint itself.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}", remedy="give a run directory or what save() wrote"
        )
    own = folders.parse(path)
    if own is not None:
        return Found(path=path, manifest=verify(path), rejected=())
    root = path
    if is_run(path):
        run = RunDirectory(path)
        root = run.checkpoint_root(load_job(run.job).checkpoint.directory)
    found = CheckpointStore(root).newest_verified()
    if found is None:
        raise CheckpointError(
            f"{path} holds no checkpoint", remedy="give a run directory or what save() wrote"
        )
    return found


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return RunDirectory(path).job.is_file()


def copy_checkpoint(found: Found, root: Path, *, linked: bool = False) -> Path:
    """Copy a checkpoint into a folder of checkpoints; it appears whole or not at all.

    Args:
        found: verified.
        root: made if need be; must not hold one of the same step.
        linked: take no room: its files, which nobody writes to again, get a second name where the disk
            can do that.

    Returns:
        The copy.

    Raises:
        CheckpointError: the place is taken, or the disk refused.
    """
    target = folders.committed_path(root, step=found.manifest.step)
    if target.exists():
        raise CheckpointError(f"{target} is there already", remedy="name a new folder")
    work = target.with_name(f"{target.name}.gen0.tmp")
    try:
        root.mkdir(parents=True, exist_ok=True)
        copy = _link_or_copy if linked else shutil.copy2
        shutil.copytree(found.path, work, dirs_exist_ok=True, copy_function=copy)
        work.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"cannot copy {found.path} to {root}: {error.strerror or error}",
            remedy="free space there, or name another folder",
        ) from error
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def load_weights(model: torch.nn.Module, found: Found) -> None:
    """Give a model the parameters and persistent buffers of a checkpoint, in place.

    Args:
        model: keeps its devices and dtypes; unchanged where the checkpoint does not fit.
        found: verified.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    targets: dict[str, torch.Tensor] = {
        **{f"parameter/{n}": p for n, p in model.named_parameters(remove_duplicate=False)},
        **{f"buffer/{n}": b for n, b in model.named_buffers(remove_duplicate=False)},
    }
    stored: dict[str, tuple[int, ...]] = {}
    by_layer: dict[str, list[str]] = defaultdict(list)
    for entry in found.manifest.shards:
        for key, (_, part) in entry.tensors.items():
            # Routers that were put in for training have buffers that the model has no place for.
            if key in targets or key.startswith("parameter/"):
                by_layer[entry.layer].append(key)
                stored[key] = tuple(part.global_shape)
    _check_fit(model, targets, stored, path=found.path)
    with torch.no_grad():
        for keys in by_layer.values():
            values = read_keys(found.path, manifest=found.manifest, keys=keys)
            for key in keys:
                targets[key].copy_(values[key])


def _check_fit(
    model: torch.nn.Module,
    targets: dict[str, torch.Tensor],
    stored: dict[str, tuple[int, ...]],
    *,
    path: Path,
) -> None:
    problem = next((f"it holds {key}" for key in stored if key not in targets), None)
    problem = problem or next(
        (
            f"{key} has shape {list(shape)} there and {list(targets[key].shape)} here"
            for key, shape in stored.items()
            if shape != tuple(targets[key].shape)
        ),
        None,
    )
    held = {id(targets[key]) for key in stored if key in targets}
    problem = problem or next(
        (f"it lacks {name}" for name, p in model.named_parameters() if id(p) not in held), None
    )
    if problem is not None:
        raise CheckpointError(
            f"{path} is of another model: {problem}",
            remedy="load it into the model that it was trained from",
        )
