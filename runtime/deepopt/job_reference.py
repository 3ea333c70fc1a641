"""Descriptions of the job file made from the models: JSON Schema, template, reference page.

`python -m deepopt.job_reference > docs/job-file.md` writes the reference page anew. What this module
does not do: check jobs (`deepopt.job_file` does).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from deepopt.config import JobConfig
from deepopt.config_fields import Section
from deepopt.job_keys import keys_of, section_within
from deepopt.job_yaml import dump_yaml

_COMMENT_WIDTH = 96  # columns

_INTRODUCTION = """\
# The job file

<!-- Made by `python -m deepopt.job_reference > docs/job-file.md`; a test keeps it true. -->

`deepopt launch JOB.yaml` reads a job from a YAML file. Every key is optional: with no file at all the
defaults below train the built-in model. `deepopt init` writes this list as a commented file,
`deepopt schema` prints its JSON Schema for editors, and the run directory keeps the resolved job.

- `--set KEY=VALUE` overrides a key, as in `--set training.steps=100` or
  `--set 'data.files=[a.txt, b/**/*.txt]'`. The value is YAML; a list or a mapping replaces the whole
  value. A later `--set` wins over an earlier one, and all win over the file.
- Scalars follow YAML 1.2: `3e-4` is a number, `on` and `12:30` are text.
- An unknown key, a key written twice, and a value of the wrong type are errors that name file and
  line. All errors of a file are listed at once.
- Import paths are written `package.module:name`.
"""


def job_schema() -> dict[str, Any]:
    """The JSON Schema of the job file, with descriptions, for editors."""
    schema = JobConfig.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "deepopt job",
    }


def init_template() -> str:
    """A job file with every key at its default, each under its description."""
    lines = [
        "# A deepopt job. Every key is optional; the values below are the defaults.",
        "# `deepopt launch THIS_FILE --set training.steps=100` overrides a key.",
    ]
    defaults = JobConfig().model_dump(mode="json", by_alias=True)
    for key, field in keys_of(JobConfig).items():
        section = section_within(field.annotation)
        lines += ["", *_comment(field.description, indent="")]
        if section is None:
            lines += dump_yaml({key: defaults[key]}).splitlines()
            continue
        lines.append(f"{key}:")
        for inner, inner_field in keys_of(section).items():
            lines += _comment(inner_field.description, indent="  ")
            written = dump_yaml({inner: defaults[key][inner]})
            lines += textwrap.indent(written, "  ").splitlines()
    return "\n".join(lines) + "\n"


def job_file_reference() -> str:
    """The text of `docs/job-file.md`."""
    parts = [_INTRODUCTION]
    top_level = {
        key: field
        for key, field in keys_of(JobConfig).items()
        if section_within(field.annotation) is None
    }
    properties = _properties(JobConfig)
    parts.append(
        _table(
            (key, properties[key], _as_code(field.default)) for key, field in top_level.items()
        )
    )
    for key, field in keys_of(JobConfig).items():
        section = section_within(field.annotation)
        if section is not None:
            parts += _section_parts(key, section)
    return "\n".join(parts)


def _section_parts(title: str, section: type[Section]) -> Iterator[str]:
    """Heading and table of a section, then of the sections inside it."""
    yield f"## `{title}`\n\n{(section.__doc__ or '').strip()}\n"
    properties = _properties(section)
    fields = keys_of(section)
    yield _table(
        (
            key,
            properties[key],
            "required"
            if field.is_required()
            else _as_code(field.get_default(call_default_factory=True)),
        )
        for key, field in fields.items()
    )
    inner_sections: dict[type[Section], list[str]] = {}
    for key, field in fields.items():
        inner = section_within(field.annotation)
        if inner is not None:
            inner_sections.setdefault(inner, []).append(f"{title}.{key}")
    for inner, titles in inner_sections.items():
        yield from _section_parts("`, `".join(titles), inner)


def _table(rows: Iterator[tuple[str, dict[str, Any], str]]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, schema, default in rows:
        meaning = schema.get("description", "").replace("|", "\\|")
        lines.append(f"| `{key}` | {_kind(schema)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _properties(section: type[Section]) -> dict[str, dict[str, Any]]:
    """The JSON Schema of each key."""
    properties: dict[str, dict[str, Any]] = section.model_json_schema(by_alias=True)[
        "properties"
    ]
    return properties


def _kind(schema: dict[str, Any]) -> str:
    """What values a JSON Schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return "keys below"
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            elements = [_kind(element) for element in schema["prefixItems"]]
            return f"list of {len(elements)}: {'; '.join(elements)}"
        return f"list of {_kind(schema['items'])}"
    limits = [
        f"{sign} {schema[name]}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in schema
    ]
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true` or `false`",
        "object": "mapping",
        "null": "`null`",
    }
    return " ".join([names[str(kind)], " and ".join(limits)]).strip()


def _as_code(value: object) -> str:
    return f"`{json.dumps(value)}`"


def _comment(description: str | None, *, indent: str) -> list[str]:
    return textwrap.wrap(
        description or "",
        width=_COMMENT_WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.stdout.write(job_file_reference())
