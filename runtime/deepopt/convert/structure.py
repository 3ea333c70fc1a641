"""Arguments and results of any shape as templates: the tensors taken out, everything around them
kept.

`take_apart` turns nested tuples, lists, dicts, slices and dataclasses into a template whose leaves
the caller chose; `put_together` makes the same structure again from other leaves. Nothing here
knows what the leaves mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Branch:
    """An inner node of a template.

    Args:
        kind: the class to make again.
        keys: of the parts; empty where they are told by position.
        parts: leaves and further branches.
    """

    kind: type
    keys: tuple[Hashable, ...]
    parts: tuple[Any, ...]


def take_apart(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """The template of a value.

    Args:
        value: anything.
        leaf: gives the template's leaf for what is no container.
    """
    opened = _open(value)
    if opened is None:
        return leaf(value)
    keys, parts = opened
    return Branch(type(value), keys, tuple(take_apart(part, leaf) for part in parts))


def put_together(template: Any, leaf: Callable[[Any], Any]) -> Any:
    """The value of a template.

    Args:
        template: as `take_apart` gave it.
        leaf: gives the value of a template's leaf.
    """
    if not isinstance(template, Branch):
        return leaf(template)
    return _close(template, [put_together(part, leaf) for part in template.parts])


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of a value in their order."""
    opened = _open(value)
    if opened is None:
        yield value
        return
    for part in opened[1]:
        yield from leaves(part)


def template_leaves(template: Any) -> Iterator[Any]:
    """The leaves of a template in their order."""
    if not isinstance(template, Branch):
        yield template
        return
    for part in template.parts:
        yield from template_leaves(part)


def _open(value: Any) -> tuple[tuple[Hashable, ...], tuple[Any, ...]] | None:
    """Keys and parts of a container; None where it is none."""
    kind = type(value)
    if kind in (tuple, list):
        return (), tuple(value)
    if kind is slice:
        return (), (value.start, value.stop, value.step)
    if isinstance(value, tuple) and (hasattr(kind, "_fields") or _is_torch_result(kind)):
        return (), tuple(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in dataclasses.fields(value))
        return names, tuple(getattr(value, name, None) for name in names)
    if isinstance(value, dict):
        return tuple(value), tuple(value.values())
    if isinstance(value, Mapping):
        names = tuple(value)
        return names, tuple(value[name] for name in names)
    return None


def _is_torch_result(kind: type) -> bool:
    """Whether it is what topk, sort, max and the like return: a tuple with names, made by C."""
    return hasattr(kind, "n_sequence_fields")


def _close(branch: Branch, parts: list[Any]) -> Any:
    kind = branch.kind
    if kind is tuple:
        return tuple(parts)
    if kind is list:
        return parts
    if kind is slice:
        return slice(*parts)
    if issubclass(kind, tuple):
        return kind(parts) if _is_torch_result(kind) else kind(*parts)
    by_name = dict(zip(branch.keys, parts, strict=True))
    if dataclasses.is_dataclass(kind):
        given = {field.name for field in dataclasses.fields(kind) if field.init}
        made: Any = kind(**{name: part for name, part in by_name.items() if name in given})
        for name, part in by_name.items():
            if name not in given:
                object.__setattr__(made, str(name), part)
        return made
    if kind is dict or not issubclass(kind, dict):
        return by_name
    return kind(by_name)
