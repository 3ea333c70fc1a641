"""Analytic costs: known sizes, published times that nothing was fitted to, laws of scaling."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.planner.hardware import parse_cluster
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.transformer_costs import (
    MODELS,
    TransformerShape,
    model_shape,
    transformer_costs,
)
from deepopt.schedule.ir import PlacementKind, place

SMALL = TransformerShape(num_layers=3, hidden=64, heads=8, sequence=32, vocab=100)


def costs(shape: TransformerShape = SMALL, **changes: Any) -> LayerCosts:
    fields: dict[str, Any] = {"cluster": parse_cluster("16xA100"), "efficiency": 0.8}
    return transformer_costs(shape, **{**fields, **changes})


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("gpt")])
def test_models_have_the_parameters_in_their_name(name: str) -> None:
    billions = float(name.split("-")[-1].rstrip("b"))
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.02)


# arXiv:2401.10241, table 9, first row of each model, ms: T_F, T_B, T_W of a rank's layers. The
# 6.2B row gave TRAFFIC_PER_STORED_BYTE; 0.8 of the peak is one guess for all.
@pytest.mark.parametrize(
    ("model", "ranks", "microbatch_size", "published_ms"),
    [
        ("gpt-1.5b", 8, 6, (18.522, 18.086, 9.337)),
        ("gpt-6.2b", 8, 3, (29.718, 29.444, 19.927)),
        ("gpt-14.6b", 16, 1, (11.347, 11.248, 8.132)),
        ("gpt-28.3b", 32, 1, (10.419, 10.207, 7.715)),
    ],
)
def test_ops_take_their_published_times(
    model: str, ranks: int, microbatch_size: int, published_ms: tuple[float, ...]
) -> None:
    shape = MODELS[model]
    priced = costs(
        shape, cluster=parse_cluster(f"{ranks}xA100"), microbatch_size=microbatch_size
    )
    layers = (shape.num_layers + 2) // ranks
    ours_ms = [
        1e3 * layers * times[1] for times in (priced.forward_s, priced.input_s, priced.weight_s)
    ]
    assert ours_ms == pytest.approx(published_ms, rel=0.08)


# arXiv:2205.05198, table 4: a layer of the 22B model, sequence parallelism, b = 4, t = 8.
@pytest.mark.parametrize(("recompute", "backward_ms"), [(False, 11.8), (True, 13.1)])
def test_a_tensor_parallel_layer_takes_its_published_time(
    recompute: bool, backward_ms: float
) -> None:
    priced = costs(
        MODELS["gpt-22b"],
        cluster=parse_cluster("8xA100"),
        microbatch_size=4,
        tensor_parallel=8,
        recompute_attention=recompute,
    )
    assert 1e3 * priced.forward_s[1] == pytest.approx(7.2, rel=0.05)
    assert 1e3 * (priced.input_s[1] + priced.weight_s[1]) == pytest.approx(
        backward_ms, rel=0.06
    )


def test_the_chain_is_embedding_blocks_and_output_layer() -> None:
    priced = costs()
    assert priced.num_layers == SMALL.num_layers + 2
    assert len(set(priced.forward_s[1:-1])) == 1
    assert priced.input_s[0] == 0
    assert priced.source == "analytic, A100 at 0.8 of its peak"


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1.0))
def test_all_seconds_are_inversely_as_the_efficiency(efficiency: float) -> None:
    best, real = costs(efficiency=1.0), costs(efficiency=efficiency)
    for name in ("forward_s", "input_s", "weight_s", "update_s"):
        scaled = [time / efficiency for time in getattr(best, name)]
        assert getattr(real, name) == pytest.approx(scaled)
    assert real.activation_bytes == best.activation_bytes


@given(st.sampled_from([2, 4, 8]))
def test_tensor_parallel_gpus_share_states_activations_and_arithmetic(t: int) -> None:
    alone, shared = costs(), costs(tensor_parallel=t)
    for name in ("state_bytes", "activation_bytes", "output_bytes", "gradient_bytes"):
        divided = [number / t for number in getattr(alone, name)]
        assert getattr(shared, name) == pytest.approx(divided)
    assert shared.weight_s[1] == pytest.approx(alone.weight_s[1] / t)
    assert shared.forward_s[1] > alone.forward_s[1] / t  # the collectives come on top
    assert len(shared.memory_bytes) == 16 // t


def test_recomputed_attention_trades_memory_for_time_in_the_backward() -> None:
    kept, again = costs(), costs(recompute_attention=True)
    assert again.activation_bytes[1] == 34 * 32 * 64
    assert kept.activation_bytes[1] == 34 * 32 * 64 + 5 * 8 * 32 * 32
    assert again.input_s[1] > kept.input_s[1]
    assert (again.forward_s, again.weight_s) == (kept.forward_s, kept.weight_s)


def test_routes_inside_a_host_and_between_hosts_have_their_own_rates() -> None:
    shape = TransformerShape(num_layers=14, hidden=64, heads=8, sequence=32, vocab=100)
    line = place(PlacementKind.LINE, num_ranks=16)
    table = costs(shape).table(tuple(range(16)), placement=line)
    inside, between = (table.transfer_between(r, target=r + 1) for r in (6, 7))
    assert between / inside == pytest.approx(100 / 25)


def test_replicas_shorten_the_pipeline() -> None:
    assert len(costs(data_parallel=2).memory_bytes) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"efficiency": 0.0}, "efficiency of 0.0"),
        ({"efficiency": 1.1}, "efficiency of 1.1"),
        ({"tensor_parallel": 3}, "tensor_parallel 3 does not divide 8 heads and the 8 GPUs"),
        ({"tensor_parallel": 16}, "tensor_parallel 16 does not divide"),
        ({"tensor_parallel": 8, "data_parallel": 3}, "16 GPUs do not form 3"),
        ({"microbatch_size": 0}, "microbatch_size 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        costs(**changes)


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(PlanError, match="no model 'gpt3-175'") as raised:
        model_shape("gpt3-175")
    assert "did you mean gpt3-175b" in raised.value.remedy
    with pytest.raises(PlanError, match="hidden = 0"):
        TransformerShape(num_layers=1, hidden=0, heads=1, sequence=1)
