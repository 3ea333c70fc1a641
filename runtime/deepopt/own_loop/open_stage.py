"""The last stage where the loss is somebody else's: outputs are handed out, their gradients come in.

It does not know batches, ranks or schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from deepopt.convert.structure import put_together, take_apart
from deepopt.errors import TrainingError
from deepopt.pipeline.stage import Layer, Loss, Stage, Tensors


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of the model's output stands among its tensors."""

    index: int


class OpenStage(Stage):
    """A last stage with a loss only while `with_loss` is open.

    Attributes:
        outputs: by micro-batch, the tensors of the model's output, detached, `requires_grad` telling
            which take a gradient; whoever takes them clears them.
        output_grads: by micro-batch, the gradients of those that take one, in their order; to be
            there before the backward of a micro-batch.
    """

    def __init__(self, index: int, layers: Sequence[Layer], **settings: Any) -> None:
        super().__init__(index, layers, **settings)
        self.outputs: dict[int, Tensors] = {}
        self.output_grads: dict[int, Tensors] = {}
        self._template: Any = None

    @contextmanager
    def with_loss(self, loss: Loss) -> Iterator[None]:
        """While this is open, F computes a loss, as in training.

        Args:
            loss: maps (output, targets) to a scalar mean.
        """
        self._loss = loss
        try:
            yield
        finally:
            self._loss = None

    def forward(
        self, microbatch: int, inputs: Tensors, targets: torch.Tensor | None = None
    ) -> Tensors:
        """F; keeps the outputs where there is no loss."""
        if self._loss is not None:
            return super().forward(microbatch, inputs, targets)
        self.outputs[microbatch] = super().forward(microbatch, inputs)
        return ()

    def backward(self, microbatch: int, output_grads: Tensors = ()) -> Tensors:
        """B, from the gradients that were put here; with a loss, from the loss."""
        return super().backward(microbatch, self.output_grads.pop(microbatch, output_grads))

    def abandon(self) -> None:
        """Drop everything in flight: the step will not be finished."""
        super().abandon()
        self.outputs.clear()
        self.output_grads.clear()

    def like_output(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Tensors in the structure in which the model last returned its output.

        Args:
            tensors: as many as the output has.
        """
        return put_together(
            self._template,
            lambda leaf: tensors[leaf.index] if isinstance(leaf, _Place) else leaf,
        )

    def _apply(self, layers: Sequence[Layer], values: Tensors, microbatch: int) -> Tensors:
        values = super()._apply(layers, values, microbatch)
        if self._loss is not None or layers[-1] is not self.layers[-1]:
            return values
        found: list[torch.Tensor] = []

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            found.append(leaf)
            return _Place(len(found) - 1)

        self._template = take_apart(values[0] if len(values) == 1 else values, place)
        if not found:
            raise TrainingError(
                f"the model returned a {type(values[0]).__name__} without tensors",
                remedy="let its forward return a tensor, or tensors in tuples, lists, dicts or "
                "dataclasses",
            )
        return tuple(found)
