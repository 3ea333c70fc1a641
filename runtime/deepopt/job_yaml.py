"""YAML for job files: text to plain values and back, with the line of every key.

Scalars follow YAML 1.2's core schema, so that `3e-4` is a number and `on`, `12:30` and `2024-01-01`
are text. Keys are text and stand once. What this module does not do: know any key of the job.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deepopt.errors import JobFileError

KeyPath = tuple[str | int, ...]  # a list element is its index

_TAG = "tag:yaml.org,2002:"
_FLOAT = (
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_CORE_SCHEMA = (  # tag, pattern, first characters ("" stands for the empty scalar)
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    ("float", _FLOAT, [*"-+0123456789."]),
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("merge", r"<<", ["<"]),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below in place of YAML 1.1's


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below in place of YAML 1.1's

    def ignore_aliases(self, data: object) -> bool:
        return True


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    try:
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    except ValueError as error:  # Python refuses to read more than 4300 digits
        raise yaml.constructor.ConstructorError(
            None, None, str(error), node.start_mark
        ) from error


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds line breaks other than \n in single quotes; its double quotes escape them.
    style = None if text.replace("\n", "").isprintable() else '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_list(dumper: _Dumper, values: list[Any]) -> yaml.SequenceNode:
    on_one_line = not any(isinstance(value, dict | list) for value in values)
    return dumper.represent_sequence(f"{_TAG}seq", values, flow_style=on_one_line)


for _name, _pattern, _first in _CORE_SCHEMA:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What a YAML text says, and where.

    Args:
        value: plain Python values; None for an empty text.
        root: the composed nodes, with marks; None for an empty text.
    """

    value: Any
    root: yaml.Node | None

    def has(self, path: KeyPath) -> bool:
        """Whether the text itself sets a key."""
        return len(list(self._nodes(path))) == len(path)

    def line_of(self, path: KeyPath) -> int | None:
        """The 1-based line of a key, or of its nearest parent in the text; None without any."""
        line = None
        for node in self._nodes(path):
            line = node.start_mark.line + 1
        return line

    def _nodes(self, path: KeyPath) -> Iterator[yaml.Node]:
        """The nodes on the way to a path: keys of mappings, elements of lists."""
        node = self.root
        for part in path:
            if isinstance(node, yaml.MappingNode):
                entries = [pair for pair in node.value if pair[0].value == part]
                if not entries:
                    return
                key, node = entries[-1]  # a merged key comes before the one that replaces it
                yield key
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    return
                node = node.value[part]
                yield node
            else:
                return


def parse_yaml(text: str, *, place: Callable[[int], str]) -> Document:
    """Read one YAML document.

    Args:
        text: the text.
        place: what errors call a 1-based line of the text, for example `job.yaml:12`.

    Raises:
        JobFileError: not YAML, more than one document, a key twice, a key that is not text.
    """
    try:
        # Building a loader reads the text: characters that YAML forbids are refused here.
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(value=None, root=None)
        _check_keys(root, path=(), ancestors=(), checked=set(), place=place)
        return Document(value=loader.construct_document(root), root=root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise JobFileError(
            f"{place(line)}: not valid YAML: {reason}",
            remedy="indent with spaces, not tabs"
            if "\\t" in reason
            else "check indentation, colons and quotes near that line",
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise JobFileError(
            f"{place(line)}: not valid YAML: {error.reason}: {text[error.position]!a}",
            remedy="remove that character, or write it as an escape in double quotes",
        ) from error
    except RecursionError as error:
        raise JobFileError(
            f"{place(1)}: nested too deeply", remedy="write it with fewer levels"
        ) from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Write plain values as YAML that `parse_yaml` reads back to the same values."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=2**31,
    )


def dotted(path: Sequence[str | int]) -> str:
    """A path as people write it: `faults.inject[0].kill`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _check_keys(
    node: yaml.Node,
    *,
    path: KeyPath,
    ancestors: tuple[yaml.Node, ...],
    checked: set[int],
    place: Callable[[int], str],
) -> None:
    """Refuse what PyYAML lets through: keys twice, keys that are not text, endless aliases."""
    line = node.start_mark.line + 1
    if any(node is ancestor for ancestor in ancestors):
        raise JobFileError(
            f"{place(line)}: {dotted(path)}: an alias that contains itself",
            remedy="write the value out",
        )
    if id(node) in checked:
        return
    checked.add(id(node))
    inside = (*ancestors, node)
    if isinstance(node, yaml.SequenceNode):
        for position, element in enumerate(node.value):
            _check_keys(
                element,
                path=(*path, position),
                ancestors=inside,
                checked=checked,
                place=place,
            )
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                written = key.value if isinstance(key, yaml.ScalarNode) else "a collection"
                within = f"{dotted(path)}: " if path else ""
                raise JobFileError(
                    f"{place(line)}: {within}the key {written or 'null'} is not text",
                    remedy=f'quote it: "{written}"'
                    if isinstance(key, yaml.ScalarNode)
                    else "use a word as the key",
                )
            if key.value in first_lines:
                raise JobFileError(
                    f"{place(line)}: {dotted((*path, key.value))}: set twice, "
                    f"first in line {first_lines[key.value]}",
                    remedy="remove one of them",
                )
            first_lines[key.value] = line
            _check_keys(
                value,
                path=(*path, key.value),
                ancestors=inside,
                checked=checked,
                place=place,
            )
