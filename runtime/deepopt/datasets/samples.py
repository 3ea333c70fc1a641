"""One sample of a user's dataset to (input, target), and samples to a micro-batch.

An input is a tensor, or a dict of tensors by the names of the model's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepopt.errors import InputError

Inputs = torch.Tensor | Mapping[str, torch.Tensor]
Batch = tuple[Inputs, torch.Tensor]


def sample_of(dataset: Any, index: int, *, where: str) -> Any:
    """A sample of a dataset; what its code raises says which one.

    Args:
        dataset: has `[index]`.
        index: which.
        where: names the micro-batch in a note on the exception.
    """
    try:
        return dataset[index]
    except Exception as error:
        error.add_note(f"{where}, sample {index}")
        raise


def model_inputs(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """The tensors of a micro-batch in the order in which the first layer takes them.

    Args:
        inputs: one tensor, or tensors by name: they go in the order of their names.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    return tuple(inputs[name] for name in sorted(inputs))


def to_pair(sample: Any, *, sequence_length: int, where: str) -> Batch:
    """Read a sample.

    Args:
        sample: a pair (input, target) of tensors, arrays or numbers, the input perhaps a dict of
            such; or sequence_length + 1
            token ids, of which the target is the input shifted by one.
        sequence_length: in tokens.
        where: names the sample in errors.

    Raises:
        InputError: it is neither.
    """
    try:
        if isinstance(sample, (tuple, list)) and len(sample) == 2:
            target = torch.as_tensor(sample[1])
            if isinstance(sample[0], Mapping):
                return {k: torch.as_tensor(v) for k, v in sample[0].items()}, target
            return torch.as_tensor(sample[0]), target
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
    first = pairs[0][0]
    targets = _stack([target for _, target in pairs], "targets", where=where)
    if isinstance(first, torch.Tensor):
        tensors = [inputs for inputs, _ in pairs if isinstance(inputs, torch.Tensor)]
        return _stack(tensors, "inputs", where=where), targets
    names = {tuple(sorted(inputs)) for inputs, _ in pairs if isinstance(inputs, Mapping)}
    if len(names) > 1:
        raise InputError(
            f"{where}: the inputs differ in their names: {sorted(names)}",
            remedy="give every sample the same inputs in the dataset",
        )
    by_name = {
        name: _stack(
            [inputs[name] for inputs, _ in pairs if isinstance(inputs, Mapping)],
            f"inputs {name!r}",
            where=where,
        )
        for name in sorted(first)
    }
    return by_name, targets


def _stack(tensors: Sequence[torch.Tensor], part: str, *, where: str) -> torch.Tensor:
    kinds = {(tuple(t.shape), t.dtype) for t in tensors}
    if len(kinds) > 1:
        raise InputError(
            f"{where}: the {part} differ in shape or dtype: {sorted(map(str, kinds))}",
            remedy="pad or cut the samples to one shape in the dataset",
        )
    return torch.stack(list(tensors))


def _refusal(where: str, found: str, sequence_length: int) -> InputError:
    return InputError(
        f"{where} is {found}",
        remedy="return a pair (input, target), or data.sequence_length + 1 = "
        f"{sequence_length + 1} whole token ids",
    )
