"""The update of a worker's layers: stage by stage in the middle of a step, or all at its end; and back.

When to update, and by which gradients, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.stage import Layer, Stage


class LayerUpdates:
    """The optimizers of a worker's layers.

    Args:
        stages: that it holds, by index.
        optimizers: by layer.
        tied_names: parameters whose gradients are whole only when all their uses are summed.
        on_device: stands around all that is done of updates; an emulated device makes it last.

    Attributes:
        before_update: called before weights and moments change.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        optimizers: Mapping[str, LayerOptimizer],
        tied_names: Collection[str],
        on_device: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._stages = stages
        self._optimizers = optimizers
        self._tied_names = frozenset(tied_names)
        self._on_device = on_device
        self._updated: set[str] = set()  # layers, in the step in work
        self._is_balanced = False  # the routers' biases were updated in the step in work
        self.before_update: Callable[[], None] = lambda: None

    def begin_step(self) -> None:
        """Nothing is updated yet."""
        self._updated.clear()
        self._is_balanced = False

    def save(self) -> None:
        """Keep a copy of weights and moments, for `restore`."""
        for optimizer in self._optimizers.values():
            optimizer.save()

    def restore(self) -> None:
        """Make weights and moments what they were at the last `save`; the routers' biases stay:
        they do not depend on clipping."""
        for optimizer in self._optimizers.values():
            optimizer.restore()
        self._updated.clear()

    def update_early(self, stage: int, rate: float) -> None:
        """Update a stage whose gradients are whole; what waits for others is left out.

        Args:
            stage: its index.
            rate: the learning rate.
        """
        layers = [
            layer
            for layer in self._stages[stage].layers
            if self._tied_names.isdisjoint(layer.trainable)
            and not self._stages[stage].experts.waits_for_norms(layer.name)
        ]
        with self._on_device():
            self._update_layers(stage, layers, rate)

    def update(self, rate: float) -> None:
        """Update all that is not updated yet in this step, routers' biases included.

        Args:
            rate: the learning rate.
        """
        with self._on_device():
            self.balance()
            for index, stage in self._stages.items():
                layers = [layer for layer in stage.layers if layer.name not in self._updated]
                self._update_layers(index, layers, rate)

    def balance(self) -> None:
        """Update the routers' biases, if they are not in this step: they wait for the sums of counts, but
        not for norms. They are buffers: `BufferHistory` takes them back."""
        if not self._is_balanced:
            self._is_balanced = True
            for stage in self._stages.values():
                stage.experts.update()

    def scale(self, coefficient: float) -> None:
        """Multiply the summed gradients by the coefficient of clipping; of 1 they stay.

        Args:
            coefficient: in (0, 1].
        """
        if coefficient < 1.0:
            for stage in self._stages.values():
                stage.gradients.scale(coefficient)

    def _update_layers(self, stage: int, layers: Sequence[Layer], rate: float) -> None:
        self.before_update()
        grads = self._stages[stage].gradients.totals()
        for layer in layers:
            self._optimizers[layer.name].step(grads, rate)
            self._updated.add(layer.name)
