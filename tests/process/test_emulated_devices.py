"""Jobs on emulated devices in real processes: the numbers of real ones, the times of the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepopt.config import JobConfig
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.plan import Plan
from deepopt.schedule.builders import build
from deepopt.schedule.simulate import simulate
from support.worker_processes import losses_of, make_plan, tiny_job, train

LINKS = {"latency_ms": 2, "rate_gb_per_s": 1, "output_mb": 1, "gradient_mb": 2, "update_ms": 1}


def on_emulated(job: JobConfig, **emulation: object) -> JobConfig:
    return JobConfig.model_validate(
        {
            **job.model_dump(by_alias=True),
            "worker": {"device": "emulated"},
            "emulation": {"forward_ms": 2, "input_ms": 2, "weight_ms": 1, **emulation},
        }
    )


def simulated_s(job: JobConfig, plan: Plan) -> float:
    costs = emulated_costs(job, num_layers=len(plan.layer_names))
    placement = plan.make_placement()
    schedule = build(plan.schedule, placement=placement, directions=plan.directions(0))
    return simulate(schedule, costs.table(plan.boundaries, placement=placement)).makespan_s


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_losses_are_those_of_real_devices_bit_for_bit(tmp_path: Path, recompute: str) -> None:
    job = tiny_job(pipeline={"recompute": recompute})
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", boundaries=(0, 4), pipeline_size=2
    )
    expected = losses_of(job, plan, run_dir=tmp_path / "real", last_step=3)
    emulated = on_emulated(job, **LINKS)
    assert losses_of(emulated, plan, run_dir=tmp_path / "emulated", last_step=3) == expected


def test_a_step_takes_what_the_simulator_says_and_little_more(tmp_path: Path) -> None:
    job = on_emulated(tiny_job(), **LINKS, rank_factor=[1, 2], forward_ms=6, input_ms=6)
    plan = make_plan(job, boundaries=(0, 4), pipeline_size=2)
    outcome = train(job, plan, run_dir=tmp_path, last_step=3)
    assert not outcome.failures, outcome.failures
    expected_s = simulated_s(job, plan)
    for report in outcome.reports[1:]:
        # No upper bound in a test: other programs may hold the cores for any time.
        assert report.step_time_s >= expected_s
    assert {ready.device for ready in outcome.ready.values()} == {"emulated"}
    overruns = outcome.ended[0].overruns
    assert overruns is not None
    assert overruns.num_operations >= 3 * 8 * 2
