"""From a checkpoint back into the user's own model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from deepopt.checkpoint.layer_files import read_keys, read_manifest
from deepopt.errors import CheckpointError
from deepopt.planner.skeleton import ModelSkeleton


def load_weights(model: torch.nn.Module, checkpoint: Path, *, skeleton: ModelSkeleton) -> None:
    """Give a model the parameters and persistent buffers of a checkpoint, in place.

    Args:
        model: keeps its devices and dtypes.
        checkpoint: a committed checkpoint.
        skeleton: of the model that was trained.

    Raises:
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    manifest = read_manifest(checkpoint)
    if manifest.skeleton_fingerprint != skeleton.fingerprint():
        raise CheckpointError(
            f"{checkpoint} is of another model",
            remedy="load it into the model that it was trained from",
        )
    targets: dict[str, torch.Tensor] = {
        **{
            f"parameter/{name}": parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
        **{
            f"buffer/{name}": buffer
            for name, buffer in model.named_buffers(remove_duplicate=False)
        },
    }
    by_layer: dict[str, list[str]] = defaultdict(list)
    for entry in manifest.shards:
        for key in entry.tensors:
            if not key.startswith("optimizer/"):
                by_layer[entry.layer].append(key)
    missing = [key for keys in by_layer.values() for key in keys if key not in targets]
    if missing:
        raise CheckpointError(
            f"{checkpoint} holds {missing[0]}, which the model has not",
            remedy="load it into the model that it was trained from",
        )
    with torch.no_grad():
        for keys in by_layer.values():
            found = read_keys(checkpoint, manifest=manifest, keys=keys)
            for key in keys:
                targets[key].copy_(found[key])
