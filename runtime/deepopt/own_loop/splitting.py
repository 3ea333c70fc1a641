"""A batch cut into micro-batches, and what the model returned for them put together again.

Samples lie along dimension 0 of every tensor. Nothing here knows ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepopt.convert.structure import leaves
from deepopt.datasets.samples import Batch
from deepopt.errors import InputError, TrainingError

Tensors = tuple[torch.Tensor, ...]


def cut(value: Any, *, into: int, what: str) -> list[Tensors]:
    """The tensors of a value, cut into equal parts.

    Args:
        value: a tensor, or tensors in tuples, lists and dicts.
        into: number of parts.
        what: names the value in errors.

    Raises:
        InputError: it has something else than tensors, or does not divide.
    """
    tensors = tuple(leaves(value))
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            raise InputError(
                f"{what}: {type(tensor).__name__} {tensor!r} has no dimension of samples",
                remedy="give tensors whose first dimension counts the samples of the batch",
            )
    sizes = sorted({len(tensor) for tensor in tensors})
    if len(sizes) != 1:
        raise InputError(
            f"{what}: the tensors have {sizes} samples; they need one number of them"
        )
    if sizes[0] == 0 or sizes[0] % into:
        raise InputError(
            f"{what}: {sizes[0]} samples do not divide into {into} micro-batches",
            remedy=f"give a multiple of {into} samples, or another number of microbatches",
        )
    return list(zip(*(tensor.chunk(into) for tensor in tensors), strict=True))


def join(parts: Sequence[Tensors], *, samples: int) -> Tensors:
    """Outputs of micro-batches as outputs of all their samples.

    Args:
        parts: tensors of each micro-batch, in order.
        samples: of one micro-batch.

    Raises:
        TrainingError: an output does not have a row for each sample.
    """
    for tensor in parts[0]:
        if tensor.dim() == 0 or len(tensor) != samples:
            raise TrainingError(
                f"the model returned a tensor of shape {list(tensor.shape)} for {samples} samples",
                remedy="let it return tensors with the samples in the first dimension, or use step()",
            )
    with torch.no_grad():
        return tuple(
            torch.cat(column).requires_grad_(column[0].requires_grad)
            for column in zip(*parts, strict=True)
        )


class GivenBatch:
    """The micro-batches of the pass in work, as an executor asks for them.

    Args:
        first: number of the first one among those of all replicas.
    """

    def __init__(self, *, first: int) -> None:
        self.first = first
        self.inputs: Sequence[Tensors] = ()
        self.targets: Sequence[Tensors] = ()

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs in their order, under names that sort as they stand, and targets."""
        place = microbatch - self.first
        inputs = {f"{i:04}": t for i, t in enumerate(self.inputs[place])}
        targets = self.targets[place][0] if self.targets else torch.empty(0)
        return inputs, targets
