"""Cut tensors into slices and merge slices into tensors.

Knows shapes only: which rank needs which slice is the plan's business, where slices lie is
the store's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepopt.checkpoint.manifest import TensorSlice, check_tiling


def cut(tensor: torch.Tensor, *, part: TensorSlice) -> torch.Tensor:
    """The slice of a whole tensor, as a view.

    Args:
        tensor: of shape `part.global_shape`.
        part: what to take.
    """
    assert tensor.shape == part.global_shape, (
        f"{tuple(tensor.shape)} is not {part.global_shape}"
    )
    for dim, (offset, extent) in enumerate(zip(part.offset, part.extent, strict=True)):
        tensor = tensor.narrow(dim, offset, extent)
    return tensor


def merge(where: str, *, parts: Sequence[tuple[TensorSlice, torch.Tensor]]) -> torch.Tensor:
    """The whole tensor of its slices, in contiguous storage.

    Args:
        where: what the tensor is, for the message.
        parts: slices with their values, all of one dtype. A single part that is the whole is
            returned as it is.

    Raises:
        CheckpointError: the slices leave a hole or overlap.
    """
    check_tiling(where, slices=[part for part, _ in parts])
    first, values = parts[0]
    if len(parts) == 1:
        return values
    whole = torch.empty(first.global_shape, dtype=values.dtype)
    for part, values in parts:
        cut(whole, part=part).copy_(values)
    return whole
