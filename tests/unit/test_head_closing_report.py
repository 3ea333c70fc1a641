import os
from pathlib import Path

import pytest

from deepopt.head.closing_report import cost_table, predict, shared_cores
from deepopt.planner.plan import Plan
from support.head_fakes import make_plan

PLAN: Plan = make_plan()  # two stages on a line, 1f1b, four micro-batches


def test_measured_times_become_the_costs_of_stages() -> None:
    costs = cost_table(
        [{"0F": 1.0, "0B": 2.0}, {"1F": 1.5, "1I": 1.0, "1W": 0.5}],
        plan=PLAN,
        update_s=0.25,
        reduce_s=0.0,
    )
    assert costs is not None
    assert costs.forward_s == (1.0, 1.5)
    assert costs.input_s == (2.0, 1.0)
    assert costs.weight_s == (0.0, 0.5)
    assert costs.update_s == (0.25, 0.25)


def test_copies_of_a_stage_are_averaged() -> None:
    times = [{"0F": 1.0, "0B": 1.0, "1F": 1.0, "1B": 1.0}, {"0F": 3.0, "1F": 1.0}]
    costs = cost_table(times, plan=PLAN, update_s=0.0, reduce_s=0.0)
    assert costs is not None
    assert costs.forward_s == (2.0, 1.0)


@pytest.mark.parametrize("times", [[], [{"0F": 1.0, "0B": 1.0}], [{"0F": 1.0, "1F": 1.0}]])
def test_a_stage_that_was_not_measured_means_no_prediction(
    times: list[dict[str, float]],
) -> None:
    assert cost_table(times, plan=PLAN, update_s=0.0, reduce_s=0.0) is None


def test_the_predicted_step_is_that_of_the_schedule() -> None:
    costs = cost_table(
        [{"0F": 1.0, "0B": 2.0}, {"1F": 1.0, "1B": 2.0}],
        plan=PLAN,
        update_s=0.5,
        reduce_s=0.0,
    )
    assert costs is not None
    # (micro-batches + ranks - 1) x (F + B), then the update
    none = Path("schedules")  # a builder's order needs no file
    assert predict(PLAN, costs, cores=None, schedules=none).makespan_s == 5 * 3.0 + 0.5
    assert predict(PLAN, costs, cores=1, schedules=none).makespan_s == 4 * 2 * 3.0 + 0.5


def test_only_cpu_workers_of_one_host_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert shared_cores(["cpu"] * cores, ["a"] * cores, threads=1) == cores
    assert shared_cores(["cuda:0"] * cores, ["a"] * cores, threads=1) is None
    assert shared_cores(["emulated"] * cores, ["a"] * cores, threads=1) is None
    assert shared_cores(["cpu"] * (cores + 1), ["a"] * cores + ["b"], threads=1) is None
