"""What a recording of a model's forward is: operations between layers, as data.

A `Recording` lists the calls that one forward made in their order: modules kept whole, and torch
functions between them. It names modules and parameters by their paths, so that it is of use to any
copy of the model. It is never changed; `split` cuts it into layers, `replay` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deepopt.convert.structure import template_leaves


@dataclass(frozen=True, slots=True)
class ValueRef:
    """A tensor made during the forward, by its number."""

    index: int


@dataclass(frozen=True, slots=True)
class StateRef:
    """A parameter, buffer or other tensor that a module holds, by its path."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant:
    """Anything else that a call was given; shared by all runs."""

    value: Any


@dataclass(frozen=True, slots=True)
class HereRef:
    """The device on which the layer runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSpec:
    """A tensor of the recording.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        requires_grad: whether a gradient flows back through it.
        node: number of the call that made it; None for an input of the model.
        storage: the same number for tensors that share memory.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    node: int | None
    storage: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        numel = 1
        for extent in self.shape:
            numel *= extent
        return numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Ambient:
    """The modes a call was made under.

    Args:
        grad: whether gradients were recorded.
        autocast: (device type, dtype) where autocast was on.
    """

    grad: bool = True
    autocast: tuple[str, torch.dtype] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A tensor that a part of a module made, and that a hook handed to the code outside.

    Args:
        part: path of the part below the module that is called; empty for that module itself.
        call: number of the part's call inside one call of the module, from 0.
        leaf: which tensor of what the part returned.
        value: its number.
    """

    part: str
    call: int
    leaf: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One call.

    Args:
        function: what was called; None for a module.
        module: path of the module that was called; None for a function.
        inputs: template of (args, kwargs).
        outputs: for each tensor of the result in order the number of its value; None where it
            is one that the call was given.
        rebound: (old, new) numbers of values that the call wrote to: the same tensor, from here
            on under a new number.
        writes_state: it wrote to a buffer.
        expected: what a call that reads a value must give again, else the forward would have
            gone another way; `reads` says that there is such a value.
        reads: it reads a value into Python.
        remedy: what to do where that value is another one; None: the usual.
        is_effect: it acts on a tensor without giving a new one, as `register_hook` does.
        captures: tensors that came out of a module without being returned.
        is_random: it draws random numbers.
        is_layer: it is a module with parameters: a layer of the chain starts here.
        position: layers started up to here, this one included.
        ambient: modes.
        flops: floating-point operations, of matrix products, convolutions and attention.
        where: file and line of the model's source.
    """

    function: Callable[..., Any] | None
    module: str | None
    inputs: Any
    outputs: tuple[int | None, ...] = ()
    rebound: tuple[tuple[int, int], ...] = ()
    writes_state: bool = False
    reads: bool = False
    remedy: str | None = None
    expected: Any = None
    is_effect: bool = False
    captures: tuple[Capture, ...] = ()
    is_random: bool = False
    is_layer: bool = False
    position: int = 0
    ambient: Ambient = Ambient()
    flops: int = 0
    where: str = ""

    def values_in(self) -> Iterator[int]:
        """Numbers of the values it is given."""
        return (
            leaf.index for leaf in template_leaves(self.inputs) if isinstance(leaf, ValueRef)
        )

    def states_in(self) -> Iterator[str]:
        """Names of the parameters, buffers and other tensors it is given."""
        return (
            leaf.name for leaf in template_leaves(self.inputs) if isinstance(leaf, StateRef)
        )

    def values_out(self) -> Iterator[int]:
        """Numbers of the values it makes."""
        yield from (index for index in self.outputs if index is not None)
        yield from (new for _, new in self.rebound)
        yield from (capture.value for capture in self.captures)

    @property
    def name(self) -> str:
        """For people."""
        if self.module is not None:
            return self.module
        return name_of(self.function)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One forward of a model.

    Args:
        num_inputs: tensors the model was given: values 0, 1, ...
        nodes: the calls in their order.
        values: every value's spec, by number.
        output: template of what the model returned.
        written: names of buffers that it wrote to.
    """

    num_inputs: int
    nodes: tuple[Node, ...]
    values: tuple[ValueSpec, ...]
    output: Any
    written: frozenset[str] = frozenset()

    def outputs(self) -> set[int]:
        """Numbers of the values the model returns."""
        return {
            leaf.index for leaf in template_leaves(self.output) if isinstance(leaf, ValueRef)
        }


def name_of(function: Any) -> str:
    """A function's name for people."""
    name = getattr(function, "__name__", None)
    if name == "__get__":  # of a property of tensors
        return str(getattr(function.__self__, "__name__", name))
    return str(name or function)
