"""Costs that a run has measured: stages' times shared out over layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.measured import measured_costs
from deepopt.planner.plan import Plan
from support.head_fakes import make_plan

PRIOR = LayerCosts(
    forward_s=(1.0, 3.0, 1.0),
    input_s=(2.0, 6.0, 2.0),
    weight_s=(1.0, 3.0, 1.0),
    output_bytes=(1.0, 1.0, 0.0),
    rank_factor=(1.0, 2.0),
    source="estimated",
)


def plan() -> Plan:
    return replace(make_plan(), layer_names=("a", "b", "c"), boundaries=(0, 2))


def test_layers_add_up_to_what_their_stage_took() -> None:
    found = measured_costs(
        [{"0F": 8.0, "0B": 12.0}, {"1F": 5.0, "1I": 4.0, "1W": 1.0}],
        plan=plan(),
        prior=PRIOR,
        update_s=1.0,
    )
    assert found is not None
    assert found.forward_s == (2.0, 6.0, 5.0)
    assert found.input_s == (2.0, 6.0, 4.0)  # a whole backward, shared as two to one
    assert found.weight_s == (1.0, 3.0, 1.0)
    assert found.update_s == (0.5, 0.5, 0.5)
    assert (found.rank_factor, found.source) == ((), "measured")
    assert found.output_bytes == PRIOR.output_bytes


def test_what_was_repeated_is_an_operation_of_its_own() -> None:
    prior = replace(PRIOR, prepare_s=(1.0, 1.0, 0.0))
    times = [{"0F": 4.0, "0R": 6.0, "0B": 9.0}, {"1F": 1.0, "1B": 3.0}]
    found = measured_costs(times, plan=plan(), prior=prior, update_s=0.0)
    assert found is not None
    assert found.prepare_s == (3.0, 3.0, 0.0)


@pytest.mark.parametrize("times", [[], [{"0F": 1.0, "0B": 1.0}], [{"0F": 1.0, "1F": 1.0}]])
def test_a_stage_that_was_not_measured_means_no_costs(times: list[dict[str, float]]) -> None:
    assert measured_costs(times, plan=plan(), prior=PRIOR, update_s=0.0) is None
