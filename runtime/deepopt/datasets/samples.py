"""One sample of a user's dataset to (input, target), and samples to a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deepopt.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor]


def to_pair(sample: Any, *, sequence_length: int, where: str) -> Batch:
    """Read a sample.

    Args:
        sample: a pair (input, target) of tensors, arrays or numbers; or sequence_length + 1
            token ids, of which the target is the input shifted by one.
        sequence_length: in tokens.
        where: names the sample in errors.

    Raises:
        InputError: it is neither.
    """
    try:
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            return torch.as_tensor(sample[0]), torch.as_tensor(sample[1])
        tokens = torch.as_tensor(sample)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(where, f"a {type(sample).__name__}: {error}", sequence_length) from error
    if tokens.shape != (sequence_length + 1,) or tokens.is_floating_point():
        found = f"{tokens.dtype} of shape {tuple(tokens.shape)}"
        raise _refusal(where, found, sequence_length)
    tokens = tokens.long()
    return tokens[:-1], tokens[1:]


def stack(pairs: Sequence[Batch], *, where: str) -> Batch:
    """Samples of one micro-batch as two contiguous tensors with a first dimension of samples.

    Args:
        pairs: (input, target) of each.
        where: names the micro-batch in errors.

    Raises:
        InputError: their shapes or dtypes differ.
    """
    stacked = []
    for part, tensors in zip(("inputs", "targets"), zip(*pairs, strict=True), strict=True):
        kinds = {(tuple(t.shape), t.dtype) for t in tensors}
        if len(kinds) > 1:
            raise InputError(
                f"{where}: the {part} differ in shape or dtype: {sorted(map(str, kinds))}",
                remedy="pad or cut the samples to one shape in the dataset",
            )
        stacked.append(torch.stack(tensors))
    return stacked[0], stacked[1]


def _refusal(where: str, found: str, sequence_length: int) -> InputError:
    return InputError(
        f"{where} is {found}",
        remedy="return a pair (input, target), or data.sequence_length + 1 = "
        f"{sequence_length + 1} whole token ids",
    )
