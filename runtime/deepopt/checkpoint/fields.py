"""Typed fields of a JSON object: take one, or say what is wrong with it. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from deepopt.errors import CheckpointError

_T = TypeVar("_T")


def as_json(name: str, value: Any) -> Any:
    """A copy of a value as JSON gives it back: tuples are lists, string subclasses strings.

    Args:
        name: what it is, for the message.
        value: the value.

    Raises:
        CheckpointError: it cannot be written as JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be written as JSON: {error}") from error


def check_names(fields: Mapping[str, Any], *, wanted: Collection[str]) -> None:
    """Check that an object has exactly these fields."""
    if set(fields) != set(wanted):
        raise CheckpointError(
            f"manifest: fields missing {sorted(set(wanted) - set(fields))}, "
            f"unknown {sorted(set(fields) - set(wanted))}"
        )


def check_type(name: str, value: Any, *, kind: type[_T]) -> _T:
    """The value, when its type is exactly `kind`; a bool is no count."""
    if type(value) is not kind:
        raise CheckpointError(f"manifest: {name} must be {kind.__name__}, found {value!r}")
    return value


def take(fields: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """The field of that name, of exactly that type."""
    return check_type(name, fields.get(name), kind=kind)


def take_optional(fields: Mapping[str, Any], name: str, kind: type[_T]) -> _T | None:
    """The field of that name, or None when it is null."""
    return None if fields.get(name) is None else take(fields, name, kind)


def take_count(fields: Mapping[str, Any], name: str) -> int:
    """The field of that name, an integer that is not negative."""
    value = take(fields, name, int)
    if value < 0:
        raise CheckpointError(f"manifest: {name} must not be negative, found {value}")
    return value


def take_list(fields: Mapping[str, Any], name: str, kind: type[_T]) -> tuple[_T, ...]:
    """The field of that name, a list whose elements all have that type."""
    return tuple(check_type(name, value, kind=kind) for value in take(fields, name, list))
