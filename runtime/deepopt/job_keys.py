"""The tree of the job's keys, read from the models: what a path names, and what was meant.

What it does not do: read files, or check values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from deepopt.config import JobConfig
from deepopt.config_fields import Section
from deepopt.job_yaml import KeyPath, dotted


def keys_of(section: type[Section]) -> dict[str, FieldInfo]:
    """The keys of a section as they are written in a job file, in order."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_within(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, optional, or in a list; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in get_args(annotation):
        if (section := section_within(part)) is not None:
            return section
    return None


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field that a path names, or that holds what it names; None for an unknown key."""
    section: type[Section] | None = JobConfig
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        if section is None:  # inside a value such as model.kwargs
            return field
        field = keys_of(section).get(part)
        if field is None:
            return None
        section = section_within(field.annotation)
    return field


def walk_keys(section: type[Section] = JobConfig, prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """All keys of a section and of those inside it, in order."""
    for key, field in keys_of(section).items():
        yield (*prefix, key)
        inner = section_within(field.annotation)
        if inner is not None:
            yield from walk_keys(inner, (*prefix, key))


def suggest_key(path: KeyPath) -> str:
    """What to say about an unknown key: the keys that may have been meant, or those there are."""
    wrong = str(path[-1])
    if "." in wrong and tuple(wrong.split(".")) in walk_keys():
        section_name, key = wrong.rsplit(".", 1)
        return f"keys nest: write {key} indented below {section_name}"
    parent = field_at(path[:-1])
    section = JobConfig if parent is None else section_within(parent.annotation)
    siblings = list(keys_of(section)) if section is not None else []
    close = difflib.get_close_matches(wrong, siblings, n=1)
    if close:
        return f"did you mean {dotted((*path[:-1], close[0]))}?"
    elsewhere = [dotted(known) for known in walk_keys() if known[-1] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    last_parts = {str(known[-1]) for known in walk_keys()}
    close = difflib.get_close_matches(wrong, sorted(last_parts), n=1, cutoff=0.8)
    if close:
        names = [dotted(known) for known in walk_keys() if known[-1] == close[0]]
        return f"did you mean {' or '.join(names[:3])}?"
    return f"known here: {', '.join(siblings)}"
