"""Objects among the arguments of a layer that would carry tensors past the cuts: caches and the like."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from deepopt.convert.places import where
from deepopt.convert.structure import leaves
from deepopt.errors import InputError


@contextmanager
def checked_objects(arguments: Any, *, known: Container[int], module: str) -> Iterator[None]:
    """Around the call of a layer: no object brings tensors in, none takes any out.

    Args:
        arguments: of the call.
        known: ids of the tensors of this forward.
        module: path of what is called, for errors.

    Raises:
        InputError: one does.
    """
    before = {}
    for leaf in leaves(arguments):
        if not _is_plain(leaf):
            inside = [id(tensor) for tensor in _tensors_inside(leaf)]
            if any(number in known for number in inside):
                raise _carries(leaf, module)
            before[id(leaf)] = (leaf, inside)
    yield
    for leaf, inside in before.values():
        if [id(tensor) for tensor in _tensors_inside(leaf)] != inside:
            raise _carries(leaf, module)


def _carries(leaf: Any, module: str | None) -> InputError:
    return InputError(
        f"{where()}: {module} is given a {type(leaf).__name__} that carries tensors from layer to "
        "layer",
        remedy="pass tensors, tuples, dicts or dataclasses; turn caches off (use_cache=False)",
    )


def _is_plain(leaf: Any) -> bool:
    plain = (int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device)
    return leaf is None or leaf is Ellipsis or isinstance(leaf, plain)


def _tensors_inside(value: Any, *, depth: int = 4) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or _is_plain(value) or isinstance(value, type | torch.nn.Module):
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_inside(part, depth=depth - 1)
