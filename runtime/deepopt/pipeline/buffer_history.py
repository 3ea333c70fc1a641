"""Buffers of the layers as they were after the last two steps: a forward may change them.

What is replayed after a fault, or begun early and taken back, must find them as the first time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepopt.pipeline.stage import Layer

_STEPS_KEPT = 2  # a step that is begun early keeps its own beside that of the step in work


class BufferHistory:
    """Copies of all buffers of some layers, by the step after which they were made.

    Args:
        layers: whose modules have the buffers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._modules = [layer.module for layer in layers]
        self._kept: dict[int, list[torch.Tensor]] = {}

    def keep(self, step: int) -> None:
        """Copy the buffers as they are.

        Args:
            step: after whose forwards; those of the next have not begun.
        """
        now = self._live()
        kept = self._kept.pop(step, None)
        if kept is None and len(self._kept) >= _STEPS_KEPT:
            kept = self._kept.pop(min(self._kept))
        if kept is None:
            kept = [torch.empty_like(tensor) for tensor in now]
        _copy(kept, now)
        self._kept[step] = kept

    def as_of(self, step: int) -> dict[int, torch.Tensor]:
        """The copies of a step by `id` of the buffer; empty when there are none."""
        kept = self._kept.get(step)
        if kept is None:
            return {}
        return {id(live): copy for live, copy in zip(self._live(), kept, strict=True)}

    def restore(self, step: int) -> None:
        """Make the buffers what they were after a step; nothing if no later forward has begun."""
        kept = self._kept.get(step)
        if kept is not None:
            _copy(self._live(), kept)

    def clear(self) -> None:
        """Forget all copies: the layers were loaded anew."""
        self._kept.clear()

    def _live(self) -> list[torch.Tensor]:
        return [buffer for module in self._modules for buffer in module.buffers()]


@torch.no_grad()
def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
