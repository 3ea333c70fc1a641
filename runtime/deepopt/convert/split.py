"""Cuts a recording into layers and finds, exactly, which tensors each cut carries. Pure.

Each call belongs to the earliest layer that has what it needs; calls with effects stay where they
were made. A call that is repeatable (no gradient, no random numbers, nothing written) may be made
again behind a cut instead of carrying its result: this is done where it needs nothing from other
layers, or where its result would be larger both than what it needs and than the largest tensor with
a gradient at any cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from deepopt.convert.graph import Node, Recording
from deepopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProgram:
    """What one layer does.

    Args:
        name: of the layer: the path of its module; `path#2` for the second use of a module.
        nodes: its calls in their order.
        takes: numbers of the values it is given.
        gives: numbers of the values it hands on; of the last layer, what the output is made of.
        output: template of the model's output; None before the last layer.
        written: names of buffers that the whole forward writes to.
    """

    name: str
    nodes: tuple[Node, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    output: Any = None
    written: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerProgram:
        return self  # never changed; functions among its constants have no copies


def split(recording: Recording) -> tuple[LayerProgram, ...]:
    """One program a layer, the finest cut.

    Args:
        recording: of one forward.

    Raises:
        InputError: no module with parameters is called, or memory shared over a cut is written.
    """
    nodes = recording.nodes
    names = _layer_names(nodes)
    homes = _homes(recording)
    _check_writes(recording, homes)
    repeated = _repeated(recording, homes, num_layers=len(names))
    cuts = [tuple(range(recording.num_inputs))]
    cuts += [_alive(recording, homes, repeated, cut) for cut in range(1, len(names))]
    cuts.append(tuple(sorted(recording.outputs())))
    programs = []
    for index, name in enumerate(names):
        takes, gives = cuts[index], cuts[index + 1]
        programs.append(
            LayerProgram(
                name=name,
                nodes=_program(recording, homes, index, takes=takes, gives=gives),
                takes=takes,
                gives=gives,
                output=recording.output if index == len(names) - 1 else None,
                written=recording.written,
            )
        )
    return tuple(programs)


def _layer_names(nodes: Iterable[Node]) -> list[str]:
    names: list[str] = []
    uses: dict[str, int] = {}
    for node in nodes:
        if node.is_layer:
            assert node.module is not None, "a layer is a module"
            uses[node.module] = count = uses.get(node.module, 0) + 1
            names.append(node.module if count == 1 else f"{node.module}#{count}")
    if not names:
        raise InputError(
            "the forward calls no module that has parameters",
            remedy="give the model parts that are torch.nn.Modules",
        )
    return names


def _is_pinned(node: Node) -> bool:
    """Whether the call has an effect, or one result only once: it stays in its place."""
    return bool(node.is_layer or node.rebound or node.writes_state)


def _homes(recording: Recording) -> list[int]:
    """The layer of each call."""
    homes: list[int] = []
    for node in recording.nodes:
        here = max(node.position - 1, 0)
        if not _is_pinned(node) and (given := list(node.values_in())):
            makers = (recording.values[value].node for value in given)
            here = max(0 if maker is None else homes[maker] for maker in makers)
        homes.append(here)
    return homes


def _check_writes(recording: Recording, homes: list[int]) -> None:
    """Refuse a write that other tensors see across a cut."""
    for number, node in enumerate(recording.nodes):
        for old, new in node.rebound:
            storage = recording.values[old].storage
            for value, spec in enumerate(recording.values):
                if value in (old, new) or spec.storage != storage:
                    continue
                if spec.node is not None and homes[spec.node] == homes[number]:
                    continue
                if spec.node is not None and spec.node >= number:
                    continue
                if any(value in later.values_in() for later in recording.nodes[number + 1 :]):
                    raise InputError(
                        f"{node.where}: {node.name} writes to memory that another tensor, made "
                        "before an earlier layer and used after this one, shares",
                        remedy="write to a clone()",
                    )


def _repeated(recording: Recording, homes: list[int], *, num_layers: int) -> frozenset[int]:
    """Values that are made again where they are needed, instead of carried."""
    alive = {
        value
        for cut in range(1, num_layers)
        for value in _alive(recording, homes, frozenset(), cut)
    }
    largest = max(
        (recording.values[v].size_bytes for v in alive if recording.values[v].requires_grad),
        default=0,
    )
    written = {value for node in recording.nodes for pair in node.rebound for value in pair}
    repeated: set[int] = set()
    for node in recording.nodes:
        values = [recording.values[value] for value in node.values_out()]
        if (
            _is_pinned(node)
            or node.is_random
            or node.reads
            or node.is_effect
            or any(value.requires_grad for value in values)
            or any(True for _ in node.states_in())
            or node.module is not None
            or written & {*node.values_out(), *node.values_in()}
        ):
            continue
        needs = _sources(recording, repeated, node.values_in())
        size = sum(value.size_bytes for value in values)
        if not needs or (
            size > largest and size > sum(recording.values[v].size_bytes for v in needs)
        ):
            repeated.update(node.values_out())
    return frozenset(repeated)


def _sources(
    recording: Recording, repeated: set[int] | frozenset[int], values: Iterable[int]
) -> set[int]:
    """The values from which others are made again."""
    found: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value not in repeated:
            found.add(value)
            continue
        maker = recording.values[value].node
        assert maker is not None, "an input is not made again"
        waiting += recording.nodes[maker].values_in()
    return found


def _alive(
    recording: Recording, homes: list[int], repeated: frozenset[int], cut: int
) -> tuple[int, ...]:
    """The values that layers from `cut` on need of those before."""
    wanted = set(recording.outputs())
    for node, home in zip(recording.nodes, homes, strict=True):
        if home >= cut:
            wanted.update(node.values_in())
            wanted.update(old for old, _ in node.rebound)

    def is_before(value: int) -> bool:
        maker = recording.values[value].node
        return maker is None or homes[maker] < cut

    sources = _sources(recording, repeated, wanted)
    return tuple(sorted(value for value in sources if is_before(value)))


def _program(
    recording: Recording,
    homes: list[int],
    layer: int,
    *,
    takes: tuple[int, ...],
    gives: tuple[int, ...],
) -> tuple[Node, ...]:
    """The layer's calls: what it must do, and what is made again for it."""
    wanted = set(gives)
    chosen: list[Node] = []
    for node, home in zip(reversed(recording.nodes), reversed(homes), strict=True):
        must = home == layer and (_is_pinned(node) or node.reads or node.is_effect)
        if must or any(value in wanted and value not in takes for value in node.values_out()):
            chosen.append(node)
            wanted.update(node.values_in())
    return tuple(reversed(chosen))
