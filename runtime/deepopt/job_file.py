"""The job file: text and `--set` overrides to a checked `JobConfig`, and back.

Everything wrong with a job is reported at once, each with file and line (or the override), key,
value, what was expected, and the next step. What this module does not do: resolve `auto` (the
planner does) or import import paths (`deepopt.import_path` does). Descriptions of the keys come
from `deepopt.job_reference` and are passed on here, so that callers know one module.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deepopt.config import JobConfig
from deepopt.config_fields import REFUSED
from deepopt.errors import JobFileError
from deepopt.job_keys import field_at, keys_of, section_within, suggest_key
from deepopt.job_reference import init_template, job_file_reference, job_schema
from deepopt.job_yaml import Document, KeyPath, dotted, dump_yaml, parse_yaml

__all__ = [
    "dump_job",
    "init_template",
    "job_file_reference",
    "job_schema",
    "load_job",
    "make_job",
]

_EXPECTED = {  # pydantic's error types in words; {names} come from the error's context
    "bool_type": "true or false",
    "dict_type": "keys and values",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "model_attributes_type": "keys and values",
    "model_type": "keys and values",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_long": "{max_length} values",
    "tuple_type": "a list",
}
_MOST_SHOWN = 80  # characters of a value in an error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Override:
    text: str
    path: tuple[str, ...]
    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Origin:
    """Where the values of a job were written."""

    source: str
    document: Document
    overrides: tuple[_Override, ...]

    def is_written(self, path: KeyPath) -> bool:
        return self.document.has(path) or any(
            path[: len(override.path)] == override.path for override in self.overrides
        )

    def place(self, path: KeyPath) -> tuple[int, str]:
        """The place of a key: its order among places, and how an error begins."""
        for order, override in reversed(list(enumerate(self.overrides))):
            if path[: len(override.path)] == override.path or (
                override.path[: len(path)] == path and not self.document.has(path)
            ):
                return order - len(self.overrides), f"--set {override.text}: "
        line = self.document.line_of(path)
        return (line, f"{self.source}:{line}: ") if line is not None else (0, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    order: int
    message: str
    remedy: str


def load_job(path: str | Path | None = None, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file, apply overrides, check everything.

    Args:
        path: the YAML file; None, and an empty file, mean all defaults.
        overrides: `key.key=value` each, the value in YAML; a later one wins over an earlier
            one, and all win over the file.

    Raises:
        JobFileError: anything wrong; the message starts with `file:line: key` or with the override.
    """
    source = "" if path is None else str(path)
    document = Document(value=None, root=None)
    if path is not None:
        document = parse_yaml(_read(Path(path)), place=lambda line: f"{source}:{line}")
    if not isinstance(document.value, dict | None):
        raise JobFileError(
            f"{source}:1: expected keys and values, found {_show(document.value)}",
            remedy="start with a key such as `training:`; `deepopt init` writes a whole file",
        )
    parsed = tuple(_parse_override(text) for text in overrides)
    values: dict[str, Any] = document.value or {}
    for override in parsed:
        values = _apply(override, values)
    origin = _Origin(source=source, document=document, overrides=parsed)
    return _validate(values, origin=origin)


def make_job(values: Mapping[str, Any]) -> JobConfig:
    """Check a job that was written in Python, with the errors of a job file.

    Args:
        values: nested like a job file: `{"training": {"steps": 100}}`.

    Raises:
        JobFileError: anything wrong; the message starts with the key.
    """
    nowhere = Document(value=None, root=None)
    return _validate(dict(values), origin=_Origin(source="", document=nowhere, overrides=()))


def dump_job(job: JobConfig) -> str:
    """Write a job as YAML with every key, so that `load_job` reads the same job back."""
    return dump_yaml(job.model_dump(mode="json", by_alias=True))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise JobFileError(
            f"{path}: no such file",
            remedy="`deepopt init` writes a job file; without one, the defaults train",
        ) from error
    except IsADirectoryError as error:
        raise JobFileError(
            f"{path}: is a directory, not a job file",
            remedy="name the file in it; `deepopt resume` takes a run directory",
        ) from error
    except OSError as error:
        raise JobFileError(
            f"{path}: cannot be read: {error.strerror}", remedy="check the path and its rights"
        ) from error
    except UnicodeDecodeError as error:
        raise JobFileError(
            f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            remedy="save it as UTF-8",
        ) from error


def _parse_override(text: str) -> _Override:
    key, equals, value = text.partition("=")
    if not equals:
        raise JobFileError(
            f"--set {text}: no '=' between key and value",
            remedy="write --set KEY=VALUE, for example --set training.steps=100",
        )
    path = tuple(part.strip() for part in key.split("."))
    if not all(path):
        raise JobFileError(
            f"--set {text}: {key!r} is not a key",
            remedy="write the key as in the job file, for example training.steps",
        )
    document = parse_yaml(value, place=lambda line: f"--set {text}")
    return _Override(text=text, path=path, value=document.value)


def _apply(override: _Override, values: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """The values with an override applied below the first `depth` parts of its path."""
    part = override.path[depth]
    if depth == len(override.path) - 1:
        return {**values, part: override.value}
    inner = values.get(part)
    if not isinstance(inner, Mapping | None):
        section = dotted(override.path[: depth + 1])
        raise JobFileError(
            f"--set {override.text}: {section} is {_show(inner)}, which has no keys",
            remedy=f"set {section} itself",
        )
    return {**values, part: _apply(override, inner or {}, depth + 1)}


def _validate(values: dict[str, Any], *, origin: _Origin) -> JobConfig:
    sections = {
        key for key, field in keys_of(JobConfig).items() if section_within(field.annotation)
    }
    # `training:` with nothing below it is a section of defaults, not a null.
    values = {
        key: value for key, value in values.items() if value is not None or key not in sections
    }
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            _describe(detail, origin=origin, values=values)
            for detail in error.errors(include_url=False)
        ]
    raise _as_error(problems)


def _as_error(problems: Sequence[_Problem]) -> JobFileError:
    first, *others = sorted(problems, key=lambda problem: problem.order)
    if not others:
        return JobFileError(first.message, remedy=first.remedy)
    lines = [
        f"{problem.message} ({problem.remedy})" if problem.remedy else problem.message
        for problem in (first, *others)
    ]
    return JobFileError("\n".join(lines), remedy=f"correct these {len(problems)} places")


def _describe(detail: ErrorDetails, *, origin: _Origin, values: Mapping[str, Any]) -> _Problem:
    """Put one of pydantic's errors into our words."""
    kind, path, value = detail["type"], tuple(detail["loc"]), detail["input"]
    if kind != "missing":
        path = _only_keys(path, values)
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        what, remedy = "unknown key", suggest_key(path)
    elif kind == REFUSED:
        what, remedy = context["message"], context["remedy"]
        blamed = [(*path, name) for name in context["fields"]] or [path]
        path = next((each for each in blamed if origin.is_written(each)), blamed[0])
    elif kind == "missing":
        what, remedy = "missing", _about(path)
    elif kind in _EXPECTED:
        what = f"expected {_EXPECTED[kind].format(**context)}, found {_show(value)}"
        remedy = _remedy(kind, value=value, path=path)
    else:
        what, remedy = f"{detail['msg']}, found {_show(value)}", _about(path)
    order, prefix = origin.place(path)
    return _Problem(order=order, message=f"{prefix}{dotted(path)}: {what}", remedy=remedy)


def _only_keys(path: KeyPath, values: Any) -> KeyPath:
    """Without the parts that are no keys: inside free values pydantic adds names of types."""
    kept = []
    for part in path:
        known = (
            part in values
            if isinstance(values, Mapping)
            else isinstance(values, Sequence) and isinstance(part, int)
        )
        if known:
            kept.append(part)
            values = values[part]
    return tuple(kept)


def _remedy(kind: str, *, value: object, path: KeyPath) -> str:
    field = field_at(path)
    if kind == "literal_error" and isinstance(value, str) and field is not None:
        close = difflib.get_close_matches(value, get_args(field.annotation), n=1)
        if close:
            return f"did you mean {close[0]}?"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _is_number(value):
        return "remove the quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    return _about(path)


def _is_number(text: str) -> bool:
    """Whether a text is a number that a key may hold: to YAML `nan` and `inf` are words."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _about(path: KeyPath) -> str:
    """What the key is for, in its own description."""
    field = field_at(path)
    if field is None or field.description is None:
        return ""
    return f"{dotted([part for part in path if isinstance(part, str)])}: {field.description.rstrip('.')}"


def _show(value: object) -> str:
    """A value as the user wrote it, or nearly."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
