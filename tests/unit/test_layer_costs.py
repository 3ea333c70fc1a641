"""Costs of layers: sums over stages, prices of copies and cuts, sizes that do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.planner.layer_costs import LayerCosts
from deepopt.schedule.ir import PlacementKind, place

LINE, MIRROR = PlacementKind.LINE, PlacementKind.MIRROR


def costs(**changes: Any) -> LayerCosts:
    fields: dict[str, Any] = {
        "forward_s": (1.0, 2.0, 3.0, 4.0),
        "input_s": (2.0, 3.0, 4.0, 5.0),
        "weight_s": (1.0, 1.0, 2.0, 2.0),
        "source": "test",
    }
    return LayerCosts(**{**fields, **changes})


def test_a_stage_costs_the_sum_of_its_layers() -> None:
    table = costs(prepare_s=(1.0, 2.0, 3.0, 0.0), update_s=(0.5,) * 4).table(
        (0, 3), placement=place(LINE, num_ranks=2)
    )
    assert table.forward_s == (6.0, 4.0)
    assert table.input_s == (9.0, 5.0)
    assert table.weight_s == (4.0, 2.0)
    assert table.prepare_s == (6.0, 0.0)
    assert table.update_s == (1.5, 0.5)
    assert table.reduce_s == ()


@given(st.sets(st.integers(1, 3)))
def test_no_cut_changes_the_whole_work(cuts: set[int]) -> None:
    boundaries = (0, *sorted(cuts))
    priced = costs()
    table = priced.table(boundaries, placement=place(LINE, num_ranks=len(boundaries)))
    assert sum(table.forward_s) + sum(table.input_s) + sum(table.weight_s) == sum(priced.work_s)


def test_an_action_costs_extra_but_an_empty_weight_gradient_is_none() -> None:
    line = place(LINE, num_ranks=2)
    table = costs(action_s=0.5).table((0, 2), placement=line)
    assert (table.forward_s, table.weight_s) == ((3.5, 7.5), (2.5, 4.5))
    whole = costs(action_s=0.5, weight_s=(0.0,) * 4).table((0, 2), placement=line)
    assert whole.weight_s == (0.0, 0.0)


def test_a_cut_costs_the_transfer_of_its_tensor() -> None:
    priced = costs(output_bytes=(10.0, 20.0, 30.0, 0.0), bytes_per_s=10.0, latency_s=0.25)
    table = priced.table((0, 2), placement=place(LINE, num_ranks=2))
    assert (table.transfer_s, table.latency_s) == (2.0, 0.25)
    assert priced.table((0, 3), placement=place(LINE, num_ranks=2)).transfer_s == 3.0


def test_routes_between_hosts_have_a_price_of_their_own() -> None:
    priced = costs(
        output_bytes=(10.0, 20.0, 30.0, 0.0),
        gradient_bytes=(10.0,) * 4,
        bytes_per_s=10.0,
        latency_s=0.25,
        host_of=(0, 0, 1, 1),
        inter_host_bytes_per_s=5.0,
        inter_host_latency_s=0.5,
    )
    line = priced.table((0, 1, 2, 3), placement=place(LINE, num_ranks=4))
    assert (line.hop_between(0, target=1), line.hop_between(1, target=2)) == (3.25, 6.5)
    mirror = priced.table((0, 1, 2, 3), placement=place(MIRROR, num_ranks=4))
    assert mirror.reduce_s == (2.5,) * 4  # a stage and its copy lie on two hosts
    one_host = replace(priced, host_of=(7,) * 4)
    assert (
        one_host.table((0, 1, 2, 3), placement=place(MIRROR, num_ranks=4)).reduce_s
        == (1.25,) * 4
    )
    replicas = one_host.table((0, 1, 2, 3), placement=place(LINE, num_ranks=4), num_replicas=2)
    assert replicas.reduce_s == (2.5,) * 4


def test_copies_are_charged_for_their_exchange() -> None:
    priced = costs(gradient_bytes=(10.0,) * 4, bytes_per_s=10.0, latency_s=0.25)
    mirror = priced.table((0, 1), placement=place(MIRROR, num_ranks=2))
    assert mirror.reduce_s == (1.25, 3.25)
    replicas = priced.table((0, 1), placement=place(LINE, num_ranks=2), num_replicas=3)
    assert replicas.reduce_s == (2.25, 6.25)
    odd = priced.table((0, 1, 2), placement=place(MIRROR, num_ranks=3))
    assert odd.reduce_s[1] == 0.0  # the middle rank holds the only copy


def test_a_mirror_holds_two_stages_of_state_a_rank() -> None:
    priced = costs(state_bytes=(1.0, 2.0, 4.0, 8.0))
    assert priced.rank_state_bytes((0, 2), placement=place(MIRROR, num_ranks=2)) == (15.0, 15.0)
    assert priced.rank_state_bytes((0, 2), placement=place(LINE, num_ranks=2)) == (3.0, 12.0)


def test_slower_devices_take_longer_and_hold_as_much() -> None:
    slow = costs(activation_bytes=(1.0,) * 4).scaled(2.0, source="guess")
    assert slow.forward_s == (2.0, 4.0, 6.0, 8.0)
    assert (slow.activation_bytes, slow.source) == ((1.0,) * 4, "guess")


def test_costs_survive_json() -> None:
    priced = costs(rank_factor=(1.0, 1.6), bytes_per_s=1e9, action_s=1e-4)
    assert LayerCosts.from_json(json.loads(json.dumps(priced.to_json()))) == priced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_s": (1.0,)}, "4 layers in forward_s, 1 in input_s"),
        ({"weight_s": ()}, "4 layers in forward_s, 0 in weight_s"),
        ({"state_bytes": (1.0,)}, "1 in state_bytes"),
        ({"prepare_s": (0.0, -1.0, 0.0, 0.0)}, r"prepare_s\[1\] = -1.0"),
        ({"bytes_per_s": 0.0}, "carries nothing"),
        ({"latency_s": float("nan")}, "latency_s nan"),
        ({"inter_host_bytes_per_s": 1.0}, "do not say where the ranks are"),
    ],
)
def test_figures_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        costs(**changes)


def test_cuts_that_do_not_fit_are_refused() -> None:
    line = place(LINE, num_ranks=2)
    with pytest.raises(PlanError, match=r"\[0, 4\] do not cut 4 layers"):
        costs().table((0, 4), placement=line)
    with pytest.raises(PlanError, match="3 stages were cut, the placement has 2"):
        costs().table((0, 1, 2), placement=line)
    with pytest.raises(PlanError, match="3 ranks in rank_factor, the placement has 2"):
        costs(rank_factor=(1.0, 1.0, 2.0)).table((0, 1), placement=line)


def test_tied_weights_on_two_ranks_pay_the_exchange_of_their_gradients() -> None:
    tied = costs(ties=((0, 3, 100.0),), bytes_per_s=10.0)
    apart = tied.table((0, 2), placement=place(LINE, num_ranks=2))
    assert apart.reduce_s == (10.0, 10.0)
    together = tied.table((0, 1, 2, 3), placement=place(PlacementKind.V, num_ranks=2))
    assert together.reduce_s == ()  # rank 0 holds the first and the last stage
    assert LayerCosts.from_json(json.loads(json.dumps(tied.to_json()))) == tied
    with pytest.raises(PlanError, match="layers 0 and 4 cannot share"):
        costs(ties=((0, 4, 1.0),))


def test_copies_sum_what_their_routers_counted_when_gradients_are_summed() -> None:
    counting = costs(counted=(1,), gradient_bytes=(), latency_s=2.0, message_s=0.25)
    mirror = counting.table((0, 2), placement=place(MIRROR, num_ranks=2))
    assert mirror.late_s == 2.0 + 2 * 0.25  # a latency, and both ends of a message
    alone = counting.table((0, 2), placement=place(LINE, num_ranks=2))
    assert alone.late_s == 0.0
    replicas = counting.table((0, 2), placement=place(LINE, num_ranks=2), num_replicas=2)
    assert replicas.late_s == mirror.late_s
    three = counting.table((0, 1, 2), placement=place(MIRROR, num_ranks=3))
    assert three.late_s == 0.0  # the middle rank holds the only copy of its stage
    assert LayerCosts.from_json(json.loads(json.dumps(counting.to_json()))) == counting


def test_gradients_of_copies_pass_through_both_ends_of_their_messages() -> None:
    priced = costs(
        gradient_bytes=(8.0,) * 4, bytes_per_s=16.0, message_s=0.25, message_bytes_per_s=32.0
    )
    mirror = priced.table((0, 2), placement=place(MIRROR, num_ranks=2))
    assert mirror.reduce_s == (16 / 16 + 2 * (0.25 + 16 / 32),) * 2


def test_only_the_chosen_layers_run_again_and_keep_their_inputs() -> None:
    whole = costs(
        prepare_s=(1.0,) * 4, input_bytes=(1.0,) * 4, activation_bytes=(5.0,) * 4, action_s=0.5
    )
    some = whole.recomputing({1})
    assert some.kept_bytes == (5.0, 1.0, 5.0, 5.0)
    table = some.table((0, 2), placement=place(LINE, num_ranks=2))
    assert table.prepare_s == (1.5, 0.0)  # a stage that repeats nothing has no R
    assert not whole.recomputing(()).recomputes
