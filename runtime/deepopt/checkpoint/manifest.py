"""The manifest of a checkpoint: pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """The part of a global tensor that a shard holds.

    Args:
        global_shape: shape of the whole tensor.
        offset: first index held, per dimension.
        extent: indices held, per dimension.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One file of a checkpoint: one layer's state from one writer.

    Args:
        layer: the layer's fully qualified name.
        writer: rank that wrote it.
        file: path relative to the checkpoint folder.
        size_bytes: file size.
        digest: 128-bit hash of the file, hexadecimal.
        tensors: key -> (dtype name, slice).
    """

    layer: str
    writer: int
    file: str
    size_bytes: int
    digest: str
    tensors: dict[str, tuple[str, TensorSlice]]
