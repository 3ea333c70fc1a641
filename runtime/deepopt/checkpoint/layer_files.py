"""Layers as files of a checkpoint folder: one file per layer and writer.

Names the files, writes a layer's state with its slices, and reads layers or single tensors
back whole, whoever wrote the parts. Which folder, and whether it is committed, is `store`'s
business.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

import torch

from deepopt.checkpoint.durable import WrittenFile, explained
from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import Manifest, ShardEntry, TensorSlice, new_digest
from deepopt.checkpoint.reshard import merge
from deepopt.checkpoint.shard_file import dtype_name, read_tensors, write_tensors
from deepopt.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
_LONGEST_STEM = 160  # file names end at 255 bytes on common file systems


def shard_name(layer: str, *, writer: int) -> str:
    """The file name of one layer from one writer; distinct and harmless for any layer name.

    Args:
        layer: the layer's fully qualified name.
        writer: the rank.
    """
    stem = quote(layer, safe="", errors="surrogatepass")
    if len(stem) > _LONGEST_STEM:
        digest = new_digest()
        digest.update(stem.encode())
        stem = f"{stem[: _LONGEST_STEM - 34]}%-{digest.hexdigest()}"
    return f"layer-{stem}.writer-{writer}.safetensors"


def write_layer(
    folder: Path, *, state: LayerState, writer: int, step: int, generation: int
) -> ShardEntry:
    """Write one layer's state into a folder in work.

    Args:
        folder: exists.
        state: CPU tensors that nobody changes meanwhile.
        writer: rank that writes.
        step: goes into the file, so that files of two steps always differ.
        generation: likewise.

    Raises:
        CheckpointError: the disk refused, or a tensor does not have its slice's extent.
    """
    tensors = {}
    for key, tensor in state.tensors.items():
        part = state.slices.get(key) or TensorSlice.whole(tensor.shape)
        if tuple(tensor.shape) != part.extent:
            raise CheckpointError(
                f"layer {state.layer!r}, {key}: shape {tuple(tensor.shape)}, "
                f"its slice says {part.extent}"
            )
        tensors[key] = (dtype_name(tensor.dtype), part)
    file = shard_name(state.layer, writer=writer)
    written = write_tensors(
        folder / file,
        tensors=state.tensors,
        metadata={
            "format": "pt",
            "layer": state.layer,
            "writer": str(writer),
            "step": str(step),
            "generation": str(generation),
        },
    )
    return ShardEntry(
        layer=state.layer,
        writer=writer,
        file=file,
        size_bytes=written.size_bytes,
        digest=written.digest,
        tensors=tensors,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises:
        CheckpointError: it is missing, damaged or of another schema version.
    """
    path = folder / MANIFEST_NAME
    with explained("read", path):
        content = path.read_bytes()
    try:
        return Manifest.from_json(content.decode())
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: manifest is damaged: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", remedy=error.remedy) from error


def read_layer(folder: Path, *, manifest: Manifest, layer: str) -> LayerState:
    """One layer, whole, whoever wrote its parts.

    Args:
        folder: a committed checkpoint.
        manifest: its manifest.
        layer: the layer's fully qualified name.

    Returns:
        Whole tensors in fresh, contiguous, aligned storage.

    Raises:
        CheckpointError: the layer is not there, or a file is missing or damaged.
    """
    shards = manifest.shards_of(layer)
    return LayerState(layer=layer, tensors=_read(folder, shards=shards, wanted=lambda _: True))


def read_keys(
    folder: Path, *, manifest: Manifest, keys: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Single tensors, whole, from whichever layers hold them; for tied weights and exports.

    Args:
        folder: a committed checkpoint.
        manifest: its manifest.
        keys: as in `LayerState.tensors`.

    Returns:
        Tensors in fresh, contiguous, aligned storage, in the order of `keys`.

    Raises:
        CheckpointError: a key is not there, or a file is missing or damaged.
    """
    wanted = list(keys)
    shards = [entry for entry in manifest.shards if not entry.tensors.keys().isdisjoint(wanted)]
    tensors = _read(folder, shards=shards, wanted=frozenset(wanted).__contains__)
    if missing := [key for key in wanted if key not in tensors]:
        raise CheckpointError(f"{folder} does not hold {missing}")
    return {key: tensors[key] for key in wanted}


def _read(
    folder: Path, *, shards: Iterable[ShardEntry], wanted: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    parts: dict[str, list[tuple[TensorSlice, torch.Tensor]]] = defaultdict(list)
    for entry in shards:
        path = folder / entry.file
        tensors = read_tensors(
            path,
            wanted=wanted,
            expected=WrittenFile(size_bytes=entry.size_bytes, digest=entry.digest),
        )
        if missing := sorted(set(filter(wanted, entry.tensors)) ^ tensors.keys()):
            raise CheckpointError(f"{path} and its manifest disagree about {missing}")
        for key, tensor in tensors.items():
            dtype, part = entry.tensors[key]
            if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (dtype, part.extent):
                raise CheckpointError(
                    f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}, "
                    f"the manifest says {dtype} {part.extent}"
                )
            parts[key].append((part, tensor))
    return {key: merge(f"{folder}: {key}", parts=parts.pop(key)) for key in list(parts)}
