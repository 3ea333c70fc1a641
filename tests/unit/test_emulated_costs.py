"""The job's `emulation` section as the costs of its layers."""

from __future__ import annotations

from typing import Any

import pytest

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.schedule.ir import PlacementKind, place


def job(*, recompute: str = "none", **emulation: Any) -> JobConfig:
    return JobConfig.model_validate(
        {"emulation": emulation, "pipeline": {"recompute": recompute}}
    )


def test_one_figure_serves_all_layers_and_a_list_each_its_own() -> None:
    costs = emulated_costs(job(forward_ms=4, weight_ms=(1, 2, 3)), num_layers=3)
    assert costs.forward_s == pytest.approx((0.004, 0.004, 0.004))
    assert costs.weight_s == pytest.approx((0.001, 0.002, 0.003))
    assert costs.source == "emulated"


def test_a_list_of_another_length_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlanError, match=r"emulation.input_ms has 2 figures, .* has 3 layers"):
        emulated_costs(job(input_ms=(1, 2)), num_layers=3)


@pytest.mark.parametrize(("section", "prepare_s"), [({}, 0.004), ({"prepare_ms": 3}, 0.003)])
def test_repeating_a_forward_costs_a_forward_unless_said_otherwise(
    section: dict[str, float], prepare_s: float
) -> None:
    costs = emulated_costs(job(recompute="full", forward_ms=4, **section), num_layers=2)
    assert costs.prepare_s == pytest.approx((prepare_s, prepare_s))


def test_without_recompute_there_is_nothing_to_prepare() -> None:
    assert not emulated_costs(job(prepare_ms=3), num_layers=2).recomputes


def test_sizes_and_rates_become_times_of_routes() -> None:
    costs = emulated_costs(
        job(latency_ms=2, rate_gb_per_s=10, output_mb=(50, 70), gradient_mb=100), num_layers=2
    )
    table = costs.table((0, 1), placement=place(PlacementKind.MIRROR, num_ranks=2))
    assert table.latency_s == pytest.approx(0.002)
    assert table.transfer_s == pytest.approx(0.005)  # of what crosses the cut: 50 MB at 10 GB/s
    assert table.reduce_s == pytest.approx((0.012, 0.012))


def test_only_what_is_not_negative_can_be_emulated() -> None:
    with pytest.raises(ValueError, match="forward_ms"):
        job(forward_ms=-1)
