"""Copies of layers for peers: who keeps them, how they lie in memory, when the next one is due."""

from __future__ import annotations

import pytest
import torch

from deepopt.pipeline.shareable_memory import place_of
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.flat_state import FlatState, Layout
from deepopt.worker.replicas import keeps_replicas, layers_without_copy


def make_plan(placement: str, *, data_size: int = 1, pipeline_size: int = 3) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=("a", "b", "c"),
        boundaries=tuple(range(pipeline_size)),
        placement=PlacementKind(placement),
        schedule="1f1b",
        pipeline_size=pipeline_size,
        data_size=data_size,
        num_microbatches=4,
        num_groups=4,
    )


def test_only_layers_without_a_second_holder_are_copied() -> None:
    odd_mirror = make_plan("mirror")  # its middle stage is its own mirror
    assert [layers_without_copy(odd_mirror, r) for r in range(3)] == [(), ("b",), ()]
    assert keeps_replicas(odd_mirror, "auto")
    assert layers_without_copy(make_plan("line"), 2) == ("c",)


@pytest.mark.parametrize(
    ("plan", "wanted", "kept"),
    [
        (make_plan("line"), "auto", True),
        (make_plan("line"), "none", False),
        (make_plan("line", data_size=2), "auto", False),
        (make_plan("line", data_size=2), "peer", True),
        (make_plan("line", pipeline_size=1), "peer", False),
    ],
)
def test_replicas_are_kept_where_they_are_of_use(plan: Plan, wanted: str, kept: bool) -> None:
    assert keeps_replicas(plan, wanted) is kept


def test_a_flat_state_holds_any_shapes_and_types_bit_for_bit() -> None:
    states = {
        "a": {
            "parameter/w": torch.randn(3, 5),
            "buffer/mask": torch.tensor([True, False, True]),
            "optimizer/w/step": torch.tensor(7.0),
        },
        "b": {"parameter/v": torch.randn(7).bfloat16(), "buffer/none": torch.empty(0, 4)},
    }
    layout = Layout.from_json(Layout.of(states).to_json())
    assert layout == Layout.of(states)
    assert layout.layers == ("a", "b")
    flat = FlatState(layout, shareable=True)
    assert place_of(flat.memory) is not None  # a peer of this host may read it
    flat.fill(states)
    other = FlatState(layout)
    assert place_of(other.memory) is None
    other.memory.copy_(flat.memory)
    for layer, state in states.items():
        for key, tensor in state.items():
            found = other.states[layer][key]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            assert found.numel() == 0 or found.data_ptr() % 64 == 0
