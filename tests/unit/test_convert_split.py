"""Any recording, cut anywhere, computes what it computes whole, from what the cuts carry."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepopt.convert.graph import Ambient, Constant, Node, Recording, ValueRef, ValueSpec
from deepopt.convert.split import LayerProgram, split
from deepopt.convert.structure import put_together, take_apart


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    """Calls that add up earlier values; some are layers, some random, some without gradient."""
    num_inputs = draw(st.integers(1, 2))

    def spec(node: int | None, *, grad: bool) -> ValueSpec:
        shape = (draw(st.integers(1, 50)),)
        number = len(values)
        return ValueSpec(
            shape=shape, dtype=torch.float32, requires_grad=grad, node=node, storage=number
        )

    values: list[ValueSpec] = []
    values += [spec(None, grad=False) for _ in range(num_inputs)]
    nodes: list[Node] = []
    position = 0
    for number in range(draw(st.integers(1, 12))):
        is_layer = number == 0 or draw(st.booleans())
        position += is_layer
        given = draw(st.lists(st.integers(0, len(values) - 1), max_size=3))
        given = given or ([0] if is_layer else [])
        grad = is_layer or draw(st.booleans())
        values.append(spec(number, grad=grad))
        nodes.append(
            Node(
                function=None,
                module=f"layer{number}" if is_layer else None,
                inputs=take_apart(tuple(given), ValueRef),
                outputs=(len(values) - 1,),
                is_layer=is_layer,
                is_random=draw(st.booleans()) and not is_layer,
                position=position,
                ambient=Ambient(),
            )
        )
    output = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    return Recording(
        num_inputs=num_inputs,
        nodes=tuple(nodes),
        values=tuple(values),
        output=take_apart((*output, None), lambda x: Constant(x) if x is None else ValueRef(x)),
    )


def run(node: Node, known: dict[int, int]) -> None:
    """A number that tells which call was made of what."""
    inputs = put_together(node.inputs, lambda leaf: known[leaf.index])
    (made,) = node.outputs
    assert made is not None
    known[made] = hash((made, *inputs))


def result(template: Any, known: dict[int, int]) -> Any:
    return put_together(
        template, lambda leaf: leaf.value if isinstance(leaf, Constant) else known[leaf.index]
    )


@given(recordings())
def test_layer_after_layer_gives_the_whole(recording: Recording) -> None:
    whole = {index: index for index in range(recording.num_inputs)}
    for node in recording.nodes:
        run(node, whole)
    programs = split(recording)
    carried = {index: index for index in range(recording.num_inputs)}
    made: Any = None
    for program in programs:
        known = {index: carried[index] for index in program.takes}
        for node in program.nodes:
            run(node, known)
        if program.output is not None:
            made = result(program.output, known)
        carried = {index: known[index] for index in program.gives}
    assert made == result(recording.output, whole)


@given(recordings())
def test_layers_and_random_calls_and_gradients_are_made_once(recording: Recording) -> None:
    programs = split(recording)
    uses = [id(node) for program in programs for node in program.nodes]
    for node in recording.nodes:
        grad = any(recording.values[v].requires_grad for v in node.values_out())
        if node.is_layer:
            assert uses.count(id(node)) == 1
        elif node.is_random or grad:
            assert uses.count(id(node)) <= 1


@given(recordings())
def test_a_cut_carries_nothing_twice_and_nothing_unknown(recording: Recording) -> None:
    programs: tuple[LayerProgram, ...] = split(recording)
    assert programs[0].takes == tuple(range(recording.num_inputs))
    for before, after in itertools.pairwise(programs):
        assert before.gives == after.takes
        assert len(set(after.takes)) == len(after.takes)
