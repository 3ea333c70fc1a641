"""The states of several layers in one stretch of memory: fast to copy, simple to send."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from deepopt.pipeline.shareable_memory import shareable_bytes

_ALIGNMENT = 64  # bytes: a cache line and the widest vector load

State = Mapping[str, torch.Tensor]
"""Tensors by key of `LayerState`."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where one tensor lies.

    Args:
        layer: name of its layer.
        key: of `LayerState`.
        dtype: as torch names it, without `torch.`.
        shape: of the tensor.
        offset: of its first byte.
    """

    layer: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return math.prod(self.shape) * itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of some layers lie in one stretch.

    Args:
        regions: in the order of their offsets.
    """

    regions: tuple[Region, ...]

    @classmethod
    def of(cls, states: Mapping[str, State]) -> Self:
        """A layout for some layers.

        Args:
            states: by layer.
        """
        regions, offset = [], 0
        for layer, state in states.items():
            for key, tensor in state.items():
                dtype = str(tensor.dtype).removeprefix("torch.")
                region = Region(layer, key, dtype, tuple(tensor.shape), offset)
                regions.append(region)
                offset += -(-region.size_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(regions))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(dict.fromkeys(region.layer for region in self.regions))

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole stretch."""
        if not self.regions:
            return 0
        last = self.regions[-1]
        return last.offset + -(-last.size_bytes // _ALIGNMENT) * _ALIGNMENT

    def to_json(self) -> list[Any]:
        """As JSON-ready data."""
        return [[r.layer, r.key, r.dtype, list(r.shape), r.offset] for r in self.regions]

    @classmethod
    def from_json(cls, rows: Iterable[Any]) -> Self:
        """From what `to_json` gave."""
        return cls(tuple(Region(a, b, c, tuple(shape), o) for a, b, c, shape, o in rows))


class FlatState:
    """The states of some layers, as they were after one step.

    Args:
        layout: where their tensors lie.
        pinned: whether a GPU shall copy to it without waiting.
        shareable: whether workers of this host shall read it where it lies; not with `pinned`.

    Attributes:
        states: views of the tensors, by layer and key of `LayerState`.
    """

    def __init__(
        self, layout: Layout, *, pinned: bool = False, shareable: bool = False
    ) -> None:
        self.layout = layout
        if shareable and not pinned:
            self.memory = shareable_bytes(layout.size_bytes)
        else:
            self.memory = torch.empty(layout.size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        for region in layout.regions:
            part = self.memory[region.offset : region.offset + region.size_bytes]
            tensor = part.view(getattr(torch, region.dtype)).view(region.shape)
            self.states.setdefault(region.layer, {})[region.key] = tensor

    @torch.no_grad()
    def fill(self, states: Mapping[str, State], *, non_blocking: bool = False) -> None:
        """Copy states in.

        Args:
            states: by layer, as the layout was made of.
            non_blocking: do not wait for a GPU.
        """
        sources = [tensor for state in states.values() for tensor in state.values()]
        targets = [self.states[layer][key] for layer, state in states.items() for key in state]
        if sources and all(source.device.type == "cpu" for source in sources):
            # One call: between two of them a thread that trains would take the interpreter.
            torch._foreach_copy_(targets, sources)
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=non_blocking)
