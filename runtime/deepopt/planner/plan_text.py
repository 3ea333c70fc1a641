"""Plan files as text: YAML with remarks, and back, with the line of everything that is wrong. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from deepopt.config_fields import Section
from deepopt.errors import DeepoptError, PlanError
from deepopt.job_yaml import Document, KeyPath, dotted, parse_yaml
from deepopt.planner.plan_file import PlanFile
from deepopt.planner.profile import LayerSection

_PLAIN = re.compile(r"[A-Za-z_][\w.:/+-]*\Z")
_NOT_TEXT = frozenset({"true", "false", "null", "yes", "no", "on", "off"})
_REMARKS: Mapping[str, str] = {
    "model": "what the figures are of; another model or micro-batch is refused",
    "hardware": "where they were measured; other devices are refused",
    "pipeline": "how the stages lie on the ranks, and in which order they work",
    "predicted": "what a step will take; `deepopt plan show` computes it anew after an edit",
    "stages": "first and last layer of each, and the pipeline ranks that hold it: move a cut by editing both "
    "sides of it",
    "layers": "times in ms of one micro-batch on rank 0, sizes in 10^6 bytes; `like`: the figures of "
    "an earlier layer",
    "orders": "of each replica, the actions of each rank: stage, operation, micro-batch",
}


def write_plan_file(plan: PlanFile) -> str:
    """A plan file as YAML for people.

    Args:
        plan: what to write.
    """
    lines = [
        f"# A plan of deepopt, {plan.source}. Show it: deepopt plan show FILE. "
        "Use it: deepopt launch JOB.yaml --plan FILE",
        f"format: {plan.format}",
        f"made: {_text(plan.made)}",
        f"source: {plan.source}",
        *([f"basis: {_text(plan.basis)}"] if plan.basis else []),
    ]
    for name in ("model", "hardware", "pipeline", "predicted"):
        section: Section | None = getattr(plan, name)
        if section is not None:
            lines += [f"{name}:  # {_REMARKS[name]}", *_block(_fields(section), indent=1)]
    lines.append(f"stages:  # {_REMARKS['stages']}")
    lines += [f"- {_flow(_fields(stage))}" for stage in plan.stages]
    lines.append(f"layers:  # {_REMARKS['layers']}")
    for layer in plan.layers:
        lines += _layer_lines(layer)
    if plan.orders:
        lines.append(f"orders:  # {_REMARKS['orders']}")
        for rows in plan.orders:
            lines += [f"{'- ' if i == 0 else '  '}- {_text(row)}" for i, row in enumerate(rows)]
    return "\n".join(lines) + "\n"


def read_plan_file(text: str, *, source: str) -> PlanFile:
    """Read a plan file and check it in itself.

    Args:
        text: the content.
        source: its path, for messages.

    Raises:
        PlanError: `source:line: what is wrong`, for the first thing that is.
    """

    def place(line: int) -> str:
        return f"{source}:{line}"

    document = parse_yaml(text, place=place)
    if not isinstance(document.value, dict):
        raise PlanError(
            f"{place(1)}: not a plan file: expected keys and values",
            remedy="`deepopt profile JOB.yaml -o FILE` writes one",
        )
    try:
        plan = PlanFile.model_validate(_as_tuples(document.value))
    except ValidationError as error:
        raise _first_problem(error, document, source=source) from None
    for path, message, remedy in _faults(plan):
        raise PlanError(f"{_place(document, path, source)}: {message}", remedy=remedy)
    try:
        plan.resolved()
        plan.costs()
        plan.schedules()
    except DeepoptError as error:
        line = _place(document, ("orders",) if plan.orders else ("pipeline",), source)
        raise PlanError(f"{line}: {error.message}", remedy=error.remedy) from error
    return plan


# What is wrong with a plan that has the right form. ------------------------------------------------


def _faults(plan: PlanFile) -> Iterator[tuple[KeyPath, str, str]]:
    """Places of faults, what they are, and what to do about them."""
    index: dict[str, int] = {}
    for number, layer in enumerate(plan.layers):
        if layer.name in index:
            yield ("layers", number), f"layer {layer.name} is there twice", "remove one of them"
        if layer.like is not None and layer.like not in index:
            yield (
                ("layers", number, "like"),
                f"layer {layer.name} is like {layer.like}, which is no earlier layer",
                "name a layer above it, or give it figures of its own",
            )
        index[layer.name] = number
    expected = 0
    names = list(index)
    for number, stage in enumerate(plan.stages):
        for key in ("first", "last"):
            name = getattr(stage, key)
            if name not in index:
                yield (
                    ("stages", number, key),
                    f"stage {number} names layer {name}, which is not among `layers`",
                    f"name one of {names[0]} .. {names[-1]}",
                )
                return
        first, last = index[stage.first], index[stage.last]
        if last < first:
            yield (
                ("stages", number, "last"),
                f"stage {number} ends with {stage.last}, which comes before its first layer "
                f"{stage.first}",
                "exchange the two",
            )
            return
        if first > expected:
            yield (
                ("stages", number, "first"),
                f"a hole: no stage holds {_range(names, expected, first)}",
                f"let stage {number} begin with {names[expected]}, or the stage before end with "
                f"{names[first - 1]}",
            )
            return
        if first < expected:
            yield (
                ("stages", number, "first"),
                f"an overlap: stage {number} holds {_range(names, first, min(expected, last + 1))}, "
                "which the stage before it holds too",
                f"let stage {number} begin with {names[expected]}"
                if expected < len(names)
                else "take the stage out",
            )
            return
        expected = last + 1
    if expected < len(names):
        yield (
            ("stages", len(plan.stages) - 1, "last"),
            f"a hole: no stage holds {_range(names, expected, len(names))}",
            f"let the last stage end with {names[-1]}",
        )
        return
    yield from _rank_faults(plan)


def _rank_faults(plan: PlanFile) -> Iterator[tuple[KeyPath, str, str]]:
    pipeline = plan.pipeline
    wanted = pipeline.ranks * pipeline.replicas
    if len(plan.hardware.devices) != wanted:
        yield (
            ("hardware", "devices"),
            f"{len(plan.hardware.devices)} devices for {pipeline.replicas} replica(s) of "
            f"{pipeline.ranks} ranks",
            f"name {wanted} devices, or profile with --workers {wanted}",
        )
        return
    for number, link in enumerate(plan.hardware.links):
        if max(link.ranks) >= wanted:
            yield (
                ("hardware", "links", number, "ranks"),
                f"a link of rank {max(link.ranks)}, there are {wanted} ranks",
                "remove it",
            )
    if len(plan.orders) not in (0, pipeline.replicas):
        yield (
            ("orders",),
            f"orders of {len(plan.orders)} replicas, there are {pipeline.replicas}",
            "give one for each, or none and the name of a builder",
        )
        return
    try:
        placement = plan.plan(plan_id=1).make_placement()
    except DeepoptError as error:
        yield ("stages",), error.message, error.remedy or "change the stages or the placement"
        return
    for number, stage in enumerate(plan.stages):
        held = placement.copies_of(number)
        if sorted(stage.ranks) != sorted(held):
            yield (
                ("stages", number, "ranks"),
                f"stage {number} lies on ranks {list(stage.ranks)}; with placement "
                f"{pipeline.placement} it is {list(held)}",
                "move layers between stages instead, or change pipeline.placement and let "
                "`deepopt profile` plan anew",
            )
            return


def _range(names: list[str], start: int, end: int) -> str:
    first, last = names[start], names[end - 1]
    return first if first == last else f"{first} .. {last}"


def _first_problem(error: ValidationError, document: Document, *, source: str) -> PlanError:
    detail = error.errors(include_url=False)[0]
    path = tuple(detail["loc"])
    context: Mapping[str, Any] = detail.get("ctx", {})
    if path == ("format",) and detail["type"] == "missing":
        return PlanError(
            f"{source}:1: this is no plan file: it has no key `format`",
            remedy="`deepopt profile JOB.yaml -o plan.yaml` writes one",
        )
    what = str(context.get("message") or detail["msg"])
    if detail["type"] == "extra_forbidden":
        what = "unknown key"
    elif detail["type"] != "missing" and "message" not in context:
        what += f", found {json.dumps(detail['input'], default=repr)[:60]}"
    return PlanError(
        f"{_place(document, path, source)}: {dotted(path)}: {what[:1].lower()}{what[1:]}",
        remedy=str(context.get("remedy") or "see docs/profile.md for what a plan file holds"),
    )


def _place(document: Document, path: KeyPath, source: str) -> str:
    return f"{source}:{document.line_of(path) or 1}"


def _as_tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: pydantic's strict numbers inside want them."""
    if isinstance(value, dict):
        return {key: _as_tuples(own) for key, own in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


# Writing. ------------------------------------------------------------------------------------------


def _fields(section: Section) -> dict[str, Any]:
    """What differs from the defaults, as plain values."""
    return section.model_dump(mode="json", exclude_defaults=True)


def _layer_lines(layer: LayerSection) -> list[str]:
    fields = _fields(layer)
    if layer.like is not None:
        return [f"- {_flow(fields)}"]
    first = [f"- name: {_text(layer.name)}"]
    return first + [
        f"  {key}: {_flow(value) if isinstance(value, dict) else _scalar(value)}"
        for key, value in fields.items()
        if key != "name"
    ]


def _block(fields: Mapping[str, Any], *, indent: int) -> Iterator[str]:
    space = "  " * indent
    for key, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{space}{key}:"
            yield from (f"{space}- {_flow(entry)}" for entry in value)
        else:
            yield f"{space}{key}: {_scalar(value)}"


def _flow(fields: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{_text(k)}: {_scalar(v)}" for k, v in fields.items()) + "}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return _flow(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    return json.dumps(value)  # numbers, true, false and null are the same in both


def _text(text: str) -> str:
    """A text, in quotes where YAML would take it for anything else."""
    plain = _PLAIN.match(text) and text.lower() not in _NOT_TEXT and not text.endswith(":")
    if plain and ": " not in text:
        return text
    quoted: str = yaml.safe_dump(
        text, default_style='"', allow_unicode=True, width=2**31, explicit_end=False
    )
    return quoted.strip()
