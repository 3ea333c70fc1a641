"""Tensors that come out of a module without being returned: hooks hand them to the code outside.

Libraries collect router logits and attention weights so. While a forward is recorded, `PartOutputs`
knows what each part of a module returned; while it is replayed, `captured` takes the same from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from deepopt.convert.graph import Capture, Node
from deepopt.convert.structure import leaves
from deepopt.errors import TrainingError


class PartOutputs:
    """What the parts of modules returned in the calls of one forward."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[TensorWeakRef, int, str, int, int]] = {}

    @contextmanager
    def noted(self, owner: torch.nn.Module | None, *, node: int) -> Iterator[None]:
        """Around a call: its parts report what they return, before their own hooks see it.

        Args:
            owner: the module that is called; None for a function.
            node: number of the call.
        """

        def note(part: str, call: int, tensors: list[torch.Tensor]) -> None:
            for position, tensor in enumerate(tensors):
                reference = TensorWeakRef(tensor)
                self._found[id(tensor)] = (reference, node, part, call, position)

        modules = () if owner is None else owner.named_modules()
        with _listening(modules, note):
            yield

    def find(self, tensor: torch.Tensor, *, value: int) -> tuple[int, Capture] | None:
        """Which call a tensor came out of, and how; None where no part returned it.

        Args:
            tensor: that the code outside uses.
            value: the number that it shall have.
        """
        found = self._found.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        _, node, part, call, leaf = found
        return node, Capture(part=part, call=call, leaf=leaf, value=value)


@contextmanager
def captured(node: Node, layer: torch.nn.Module, values: dict[int, Any]) -> Iterator[None]:
    """Around the replay of a call: takes what comes out of it by hooks.

    Args:
        node: the call.
        layer: holds the module that is called.
        values: by number; gets the tensors.

    Raises:
        TrainingError: a part was not called, or returned something else than when it was recorded.
    """
    if not node.captures:
        yield
        return
    assert node.module is not None, "only modules have parts"
    owner = layer.get_submodule(node.module)
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def note(part: str, call: int, tensors: list[torch.Tensor]) -> None:
        seen[part, call] = tensors

    parts = dict.fromkeys(capture.part for capture in node.captures)
    with _listening([(part, owner.get_submodule(part)) for part in parts], note):
        yield
    for capture in node.captures:
        tensors = seen.get((capture.part, capture.call), [])
        if capture.leaf >= len(tensors):
            raise TrainingError(
                f"{node.where}: {node.name}.{capture.part} did not return what it returned when "
                "the model was converted",
                remedy="let it be called the same way each time",
            )
        values[capture.value] = tensors[capture.leaf]


@contextmanager
def _listening(
    modules: Iterable[tuple[str, torch.nn.Module]],
    note: Callable[[str, int, list[torch.Tensor]], None],
) -> Iterator[None]:
    """Let modules report (path, number of the call, tensors returned)."""

    def hook_of(part: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        calls = itertools.count()

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in leaves(output) if isinstance(leaf, torch.Tensor)]
            note(part, next(calls), tensors)

        return hook

    handles = [
        module.register_forward_hook(hook_of(part), prepend=True) for part, module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
