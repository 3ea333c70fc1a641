"""How a step's samples lie: which tensors of a user's batch are inputs, which are targets, and how a
batch is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deepopt.datasets.samples import Batch
from deepopt.errors import InputError

TARGET_NAMES = ("labels", "label", "targets", "target")
_REMEDY = (
    "let the dataset (or its collate_fn) give a pair (inputs, targets), inputs a tensor, a tuple or "
    f"a dict by the names of the model's arguments; or one dict with {TARGET_NAMES[0]!r} in it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a step, and what the model's inputs are called.

    Args:
        microbatches: of one step.
        microbatch_size: samples of one micro-batch.
        input_names: of the model's arguments, in order; empty where its layers take positions.
        takes_any_name: whether the model takes arguments of any name.
        seed: of the data order and of the data code's random numbers.
        needs_targets: whether a batch without targets is an error.
    """

    microbatches: int
    microbatch_size: int
    input_names: tuple[str, ...] = ()
    takes_any_name: bool = False
    seed: int = 0
    needs_targets: bool = True

    @property
    def batch_size(self) -> int:
        """Samples of one step."""
        return self.microbatches * self.microbatch_size


def to_batch(batch: Any, *, layout: Layout, where: str) -> Batch:
    """Read a batch that a user's code gave.

    Args:
        batch: a pair (inputs, targets); several tensors, the last one the targets; or a dict of
            the model's arguments, with targets among them.
        layout: names the inputs.
        where: names the batch in errors.

    Returns:
        (inputs, targets): inputs a tensor, or tensors by name.

    Raises:
        InputError: it is none of these.
    """
    if not layout.needs_targets:
        batch = with_targets(batch)
    if isinstance(batch, Mapping):
        found = [name for name in TARGET_NAMES if isinstance(batch.get(name), torch.Tensor)]
        if not found:
            raise InputError(f"{where} has no targets: {_what(batch)}", remedy=_REMEDY)
        known = layout.takes_any_name or found[0] in layout.input_names
        named = {k: v for k, v in batch.items() if known or k != found[0]}
        return _named(named, where=where), batch[found[0]]
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise InputError(f"{where} has no targets: {_what(batch)}", remedy=_REMEDY)
    targets = batch[-1]
    if not isinstance(targets, torch.Tensor):
        raise InputError(
            f"{where}: its targets are a {_what(targets)}, not a tensor",
            remedy="give one tensor of targets: stack several along a dimension, and let loss_fn "
            "take them apart",
        )
    inputs: Any = batch[0] if len(batch) == 2 else tuple(batch[:-1])
    if isinstance(inputs, torch.Tensor):
        return inputs, targets
    if isinstance(inputs, Mapping):
        return _named(inputs, where=where), targets
    if not isinstance(inputs, tuple | list):
        raise InputError(f"{where}: its inputs are a {_what(inputs)}", remedy=_REMEDY)
    if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor):
        return inputs[0], targets
    names = layout.input_names or tuple(f"{index:03d}" for index in range(len(inputs)))
    if len(names) < len(inputs):
        raise InputError(
            f"{where} has {len(inputs)} inputs, the model's forward takes {len(names)} "
            f"({', '.join(names)})",
            remedy=_REMEDY,
        )
    return _named(dict(zip(names, inputs, strict=False)), where=where), targets


def with_targets(batch: Any) -> Any:
    """A batch of inputs alone as a pair with targets that nobody looks at; other batches as they are.

    Args:
        batch: a tensor, a tuple of one, a dict without targets; or with targets.
    """
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, torch.Tensor):
        values = [batch]
    elif isinstance(batch, Mapping) and not any(name in batch for name in TARGET_NAMES):
        values = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    else:
        return batch
    length = next((value.shape[0] for value in values if value.dim()), None)
    return batch if length is None else (batch, torch.zeros(length, dtype=torch.int64))


def filled_up(batch: Batch, *, size: int) -> Batch:
    """A batch with its last sample repeated up to a size.

    Args:
        batch: inputs and targets; tensors whose first dimension is not that of the samples stay.
        size: samples wanted, at least those that there are.
    """
    inputs, targets = batch
    own = targets.shape[0] if targets.dim() else 0
    if own in (0, size):
        return batch

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != own:
            return tensor
        return torch.cat([tensor, *[tensor[-1:]] * (size - own)])

    if isinstance(inputs, torch.Tensor):
        return longer(inputs), longer(targets)
    return {name: longer(tensor) for name, tensor in inputs.items()}, longer(targets)


def split(batch: Batch, *, layout: Layout, where: str) -> list[Batch]:
    """Cut a step's batch into micro-batches, along its first dimension.

    Tensors whose first dimension is another one, a mask for example, go into each whole.

    Args:
        batch: inputs and targets.
        layout: how many micro-batches.
        where: names the batch in errors.

    Raises:
        InputError: the batch does not divide.
    """
    inputs, targets = batch
    size = targets.shape[0] if targets.dim() else 0
    if size == 0 or size % layout.microbatches:
        raise InputError(
            f"{where} has {size} samples, which do not make {layout.microbatches} equal "
            "micro-batches",
            remedy=f"make it a multiple of {layout.microbatches}, or set microbatches to a divisor "
            f"of {size}",
        )
    length = size // layout.microbatches

    def part(tensor: torch.Tensor, index: int) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size:
            return tensor
        return tensor[index * length : (index + 1) * length].clone()

    def inputs_of(index: int) -> Any:
        if isinstance(inputs, torch.Tensor):
            return part(inputs, index)
        return {name: part(tensor, index) for name, tensor in inputs.items()}

    return [(inputs_of(i), part(targets, i)) for i in range(layout.microbatches)]


class SameShapes:
    """Refuses a micro-batch that is not of the first one's shapes: tensors at a cut have one shape.

    Args:
        name: of the dataset, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: dict[str, tuple[Any, ...]] | None = None

    def check(self, batch: Batch, *, step: int, microbatch: int) -> Batch:
        """The batch itself.

        Raises:
            InputError: its shapes or dtypes are others.
        """
        inputs, targets = batch
        named = {"input": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
        found = {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in (*named.items(), ("targets", targets))
        }
        if self._first is None:
            self._first = found
        elif found != self._first:
            name = next(
                n for n in {**found, **self._first} if found.get(n) != self._first.get(n)
            )
            raise InputError(
                f"{self._name}: step {step}, micro-batch {microbatch}: {name} is "
                f"{_spec(found.get(name))}, the first one was {_spec(self._first.get(name))}",
                remedy="pad or cut all batches to one shape, in the dataset or its collate_fn",
            )
        return batch


def num_tokens(batch: Batch) -> int:
    """For throughput: whole-number targets are tokens; else samples count."""
    targets = batch[1]
    if targets.dim() > 0 and not targets.is_floating_point():
        return targets.numel()
    return targets.shape[0] if targets.dim() else 1


def _named(inputs: Mapping[str, Any], *, where: str) -> dict[str, torch.Tensor]:
    given = {name: value for name, value in inputs.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{where}: input {name!r} is a {_what(value)}, not a tensor", remedy=_REMEDY
            )
    if not given:
        raise InputError(f"{where} has no inputs", remedy=_REMEDY)
    return given


def _spec(spec: tuple[Any, ...] | None) -> str:
    return (
        "absent" if spec is None else f"{list(spec[0])} {str(spec[1]).removeprefix('torch.')}"
    )


def _what(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, torch.Tensor):
        return f"tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
