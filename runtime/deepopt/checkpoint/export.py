"""Final weights for everyone else: safetensors under the model's original names.

Reads a committed checkpoint, needs no model and no process group, and holds one output file in
memory. Optimizer state is left out. Resuming reads checkpoints, never this.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from deepopt.checkpoint.durable import (
    explained,
    fsync_directory,
    make_directory,
    put_directory,
    remove_directory,
    write_file,
)
from deepopt.checkpoint.layer_files import read_keys, read_manifest
from deepopt.checkpoint.manifest import Manifest
from deepopt.checkpoint.shard_file import write_tensors
from deepopt.errors import CheckpointError
from deepopt.planner.skeleton import ModelSkeleton

MAX_SHARD_BYTES = 5 * 10**9  # Hugging Face's "5GB"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_model.safetensors"  # as peft's save_pretrained
_EXPORTED = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(generation_|adapter_)?config\.json"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """One entry of the model's `state_dict`.

    `key` is where the checkpoint holds its values: for a tied parameter its owner's key.
    """

    name: str
    key: str
    dtype: torch.dtype
    size_bytes: int


def export_weights(
    checkpoint: Path,
    skeleton: ModelSkeleton,
    directory: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    leave_out: Collection[str] = (),
    beside: Mapping[str, str] | None = None,
    adapter_names: Mapping[str, str] | None = None,
    tell: Callable[[str, float], None] | None = None,
) -> list[Path]:
    """Write parameters and buffers so that `load_state_dict(strict=True)` takes them.

    Parameters get the dtype that the model's own have; tied ones are written under each of
    their names. The folder appears whole or not at all; an earlier export is replaced.

    Args:
        checkpoint: a committed checkpoint.
        skeleton: of the model that was trained.
        directory: where to; new, or holding nothing but an earlier export.
        max_shard_bytes: largest file, in bytes of tensors; more become
            `model-00001-of-00003.safetensors` and so on, with an index as Hugging Face writes
            it. A larger tensor gets a file of its own.
        leave_out: names that the reader finds by itself: further names of tied parameters.
        beside: name -> content of text files that belong to the weights (`config.json`).
        adapter_names: write these entries of the `state_dict` alone, under the names given, into
            `adapter_model.safetensors`, as one file; None: all, under their own.
        tell: is told the file that is being written, and which share of all bytes is done.

    Returns:
        The files, the index last when there is one, then those beside.

    Raises:
        CheckpointError: the checkpoint is damaged, of another model, or lacks a tensor; the
            folder holds other files; the disk refused.
    """
    manifest = read_manifest(checkpoint)
    if manifest.skeleton_fingerprint != skeleton.fingerprint():
        raise CheckpointError(
            f"{checkpoint} is of another model: its skeleton is "
            f"{manifest.skeleton_fingerprint}, the one given is {skeleton.fingerprint()}"
        )
    _check_replaceable(directory)
    weights = [w for w in _weights(manifest, skeleton=skeleton) if w.name not in leave_out]
    if adapter_names is None:
        files = _pack(weights, max_shard_bytes=max_shard_bytes)
    else:
        chosen = [w for w in weights if w.name in adapter_names]
        files = {ADAPTER_NAME: [replace(w, name=adapter_names[w.name]) for w in chosen]}
    work, aside, trash = (
        directory.with_name(f"{directory.name}.{ending}") for ending in ("tmp", "old", "trash")
    )
    for leftover in (work, aside):
        if leftover.exists():
            remove_directory(leftover, trash=trash)
    make_directory(work)
    total, done = sum(w.size_bytes for held in files.values() for w in held), 0
    for file, held in files.items():
        if tell is not None:
            tell(file, done / max(total, 1))
        done += sum(weight.size_bytes for weight in held)
        values = _read(checkpoint, manifest=manifest, weights=held)
        write_tensors(work / file, tensors=values, metadata={"format": "pt"})
        del values
    names = list(files)
    if len(files) > 1:
        names.append(INDEX_NAME)
        write_file(work / INDEX_NAME, pieces=[_index(files).encode()])
    for name, content in (beside or {}).items():
        names.append(name)
        write_file(work / name, pieces=[content.encode()])
    fsync_directory(work)
    if put_directory(work, target=directory, aside=aside):
        remove_directory(aside, trash=trash)
    return [directory / name for name in names]


def _weights(manifest: Manifest, *, skeleton: ModelSkeleton) -> list[_Weight]:
    stored = {
        key: (dtype, part.global_shape)
        for entry in manifest.shards
        for key, (dtype, part) in entry.tensors.items()
    }
    owners = {p.name: p.tied_to for layer in skeleton.layers for p in layer.parameters}

    def weight(name: str, *, key: str, dtype: str | None) -> _Weight:
        if key not in stored:
            raise CheckpointError(f"step {manifest.step} holds no {key}, wanted for {name}")
        stored_dtype, shape = stored[key]
        kind = getattr(torch, dtype or stored_dtype)
        return _Weight(name=name, key=key, dtype=kind, size_bytes=prod(shape) * kind.itemsize)

    weights = []
    for layer in skeleton.layers:
        for parameter in layer.parameters:
            if not parameter.in_state_dict:
                continue
            owner = parameter.name
            while (further := owners[owner]) is not None:
                owner = further
            key = f"parameter/{owner}"
            weights.append(weight(parameter.name, key=key, dtype=parameter.dtype))
        weights += [weight(name, key=f"buffer/{name}", dtype=None) for name in layer.buffers]
    return weights


def _pack(weights: Iterable[_Weight], *, max_shard_bytes: int) -> dict[str, list[_Weight]]:
    """Fill files in the model's order."""
    shards: list[list[_Weight]] = [[]]
    filled = 0
    for weight in weights:
        if shards[-1] and filled + weight.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += weight.size_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{index:05d}-of-{len(shards):05d}.safetensors": shard
        for index, shard in enumerate(shards, start=1)
    }


def _read(
    checkpoint: Path, *, manifest: Manifest, weights: Iterable[_Weight]
) -> dict[str, torch.Tensor]:
    """The values of one file, read file by file of the checkpoint."""
    layer_of = {key: entry.layer for entry in manifest.shards for key in entry.tensors}
    by_layer: dict[str, list[_Weight]] = defaultdict(list)
    for weight in weights:
        by_layer[layer_of[weight.key]].append(weight)
    values = {}
    for held in by_layer.values():
        tensors = read_keys(checkpoint, manifest=manifest, keys={w.key for w in held})
        for weight in held:
            values[weight.name] = tensors[weight.key].to(weight.dtype)
    return values


def _index(files: Mapping[str, list[_Weight]]) -> str:
    total = sum(weight.size_bytes for weights in files.values() for weight in weights)
    names = {weight.name: file for file, weights in files.items() for weight in weights}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return json.dumps(index, indent=2) + "\n"


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    with explained("list", directory):
        found = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in found if not _EXPORTED.fullmatch(name)]
    if foreign:
        raise CheckpointError(
            f"{directory} holds files that are no earlier export: {foreign[:5]}",
            remedy="name a new folder",
        )
