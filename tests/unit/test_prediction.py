"""A step among others is predicted, and what it took instead is put down to measured parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.head.prediction_report import prediction_error, with_others
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan import Plan
from deepopt.planner.prediction import (
    DISPATCH,
    MORE_OTHERS,
    OTHERS,
    REST,
    SUMS,
    TURN,
    MeasuredRun,
    Prediction,
    causes,
    predict,
)
from deepopt.schedule.builders import build
from deepopt.schedule.ir import Direction, Op, PlacementKind, place
from deepopt.schedule.period import num_messages, period
from deepopt.schedule.simulate import CostTable, simulate
from support.head_fakes import make_plan

PLAN: Plan = make_plan()  # two stages on a line, 1f1b, four micro-batches, four layers
SCHEDULE = build("1f1b", placement=PLAN.make_placement(), directions=PLAN.directions(0))
COSTS = LayerCosts(
    forward_s=(1.0,) * 4,
    input_s=(1.5,) * 4,
    weight_s=(0.5,) * 4,
    update_s=(0.25,) * 4,
    source="measured",
)


def predicted(costs: LayerCosts = COSTS, *, cores: int | None = None) -> Prediction:
    found = predict(costs, plan=PLAN, schedules=(SCHEDULE,), cores=cores, overlap=False)
    assert found is not None
    return found


def measured(prediction: Prediction, *, factor: float = 1.0, **parts: float) -> MeasuredRun:
    """A run whose stages took `factor` times as long as predicted, with parts of its steps."""
    times = {}
    for stage, (forward, inputs, weights, _) in enumerate(prediction.stage_s):
        times |= {f"{stage}F": forward * factor, f"{stage}B": (inputs + weights) * factor}
    own = {"update_cpu_s": 0.5, "agree_wall_s": 0.0, **parts}
    return MeasuredRun(step_s=prediction.step_s, op_times_s=[times], parts_s=[own, own])


def test_a_step_is_predicted_with_updates_in_the_next_warm_up() -> None:
    # rank 0: update 0.5, then (4 + 1) x (F 2 + B 4); rank 1 updates while it waits.
    assert predicted().step_s == pytest.approx(0.5 + 5 * 6.0)
    assert predicted(replace(COSTS, agree_s=0.1)).step_s == pytest.approx(30.6)
    shared = predicted(cores=1)
    assert shared.step_s == pytest.approx(2 * (0.5 + 4 * 6.0))
    assert shared.bubble == pytest.approx(0.5)


def test_a_step_ends_with_late_sums_and_the_turn_to_the_next() -> None:
    table = PLAN.stage_costs(COSTS)
    before = period(SCHEDULE, table)
    after = period(SCHEDULE, replace(table, late_s=0.3, turn_s=0.2))
    assert after.step_s == pytest.approx(before.step_s + 0.5)
    assert sum(after.busy_s) == pytest.approx(sum(before.busy_s) + 2 * 0.2)


@pytest.mark.parametrize(("cores", "later_s"), [(1, 9.0), (2, 0.0)])
def test_emulated_devices_wait_for_a_core_and_keep_it_for_their_real_work(
    cores: int, later_s: float
) -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=2)
    order = build("bi_stream", placement=placement, directions=(Direction.DOWN, Direction.UP))
    plain = CostTable.uniform(2, forward_s=10.0, input_s=10.0, weight_s=10.0)
    # Mirrored ranks begin their first F, their second F and their last B at once: on one core one of them
    # waits each time for what the other's takes really.
    real = replace(plain, host_s=((3.0,) * 2, (2.0,) * 2, (1.0,) * 2), host_cores=cores)
    assert period(order, real).step_s == pytest.approx(period(order, plain).step_s + later_s)


def test_costs_that_are_no_seconds_predict_nothing() -> None:
    estimated = replace(COSTS, source="estimated")
    found = predict(estimated, plan=PLAN, schedules=(SCHEDULE,), cores=None, overlap=False)
    assert found is None


def test_each_end_of_a_message_takes_its_rank_and_a_core() -> None:
    assert num_messages(SCHEDULE) == (8, 8)
    with_messages = predicted(replace(COSTS, message_s=0.01), cores=1)
    assert with_messages.step_s == pytest.approx(2 * (0.5 + 4 * 6.0 + 8 * 0.01))


@given(
    ranks=st.integers(1, 4),
    count=st.integers(1, 8),
    message_s=st.floats(0, 0.5),
    cores=st.none() | st.integers(1, 3),
)
def test_messages_never_shorten_a_step_and_add_up_on_one_core(
    ranks: int, count: int, message_s: float, cores: int | None
) -> None:
    placement = place(PlacementKind.LINE, num_ranks=ranks)
    order = build("1f1b", placement=placement, directions=(Direction.DOWN,) * count)
    plain = CostTable.uniform(ranks, forward_s=1.0, input_s=1.0, weight_s=1.0)
    loaded = replace(plain, message_s=message_s)
    before, after = (period(order, t, cores=cores) for t in (plain, loaded))
    assert sum(after.busy_s) == pytest.approx(
        sum(before.busy_s) + sum(num_messages(order)) * message_s
    )
    if cores is None or cores == 1:
        assert after.step_s >= before.step_s - 1e-9
    if cores == 1:
        assert after.step_s == pytest.approx(sum(after.busy_s))
    if cores is None:
        assert before.step_s == pytest.approx(simulate(order, plain).makespan_s)


def test_a_prediction_survives_its_file() -> None:
    found = predicted(cores=2)
    assert Prediction.from_json(found.to_json()) == found


def test_slow_stages_are_named_as_the_cause() -> None:
    prediction = predicted()
    run = replace(measured(prediction, factor=1.2), step_s=0.5 + 1.2 * 30)
    first, *others = causes(prediction, run, plan=PLAN, schedule=SCHEDULE)
    assert first.what == "stage times differ from the profile"
    assert first.share == pytest.approx(6 / 30.5)
    assert all(abs(cause.share) < 1e-9 for cause in others)


def test_copies_of_a_stage_on_unlike_devices_are_no_cause() -> None:
    plan = replace(
        PLAN,
        placement=PlacementKind.MIRROR,
        schedule="bi_stream",
        boundaries=(0, 2),
        num_groups=2,
    )
    schedule = build(
        "bi_stream", placement=plan.make_placement(), directions=plan.directions(0)
    )
    costs = replace(COSTS, rank_factor=(1.0, 1.5))
    prediction = predict(costs, plan=plan, schedules=(schedule,), cores=None, overlap=False)
    assert prediction is not None
    table = plan.stage_costs(costs)
    times = [
        {
            f"{stage}{op}": factor * table.duration_s(stage, op=op)
            for stage in range(2)
            for op in (Op.F, Op.B)
        }
        for factor in (1.0, 1.5)
    ]
    parts = {"update_cpu_s": 1.0}  # of the layers of both stages
    run = MeasuredRun(step_s=prediction.step_s, op_times_s=times, parts_s=[parts, parts])
    found = {c.what: c.share for c in causes(prediction, run, plan=plan, schedule=schedule)}
    assert found["stage times differ from the profile"] == pytest.approx(0.0)


def test_messages_other_processes_and_the_rest_are_told_apart() -> None:
    prediction = predicted(cores=1)
    run = measured(
        prediction, send_cpu_s=0.5, receive_cpu_s=0.3, thread_cpu_s=1.0, process_cpu_s=1.2
    )
    run = replace(
        run,
        step_s=1.5 * prediction.step_s,
        parts_s=[{**parts, "others_cpu_s": 0.1 * run.step_s} for parts in run.parts_s],
    )
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found["CPU time of sends and receives"] == pytest.approx(2.0 / prediction.step_s)
    assert found[OTHERS] > 0.05
    assert sum(found.values()) == pytest.approx(0.5)
    assert found[REST] > 0.2


def test_what_others_used_is_a_mean_and_set_against_the_mean_step() -> None:
    prediction = predicted(cores=1)
    # They had half the core in the mean, in a few long steps most of it.
    run = replace(
        measured(prediction), step_s=2 * prediction.step_s, mean_step_s=4 * prediction.step_s
    )
    others = [{**parts, "others_cpu_s": 2 * prediction.step_s} for parts in run.parts_s]
    run = replace(run, parts_s=others)
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found[OTHERS] == pytest.approx(1.0)
    assert found[REST] == pytest.approx(0.0)


BUSY = replace(COSTS, background_processes=0.05, background_threads=0.05)


def test_what_runs_beside_the_training_takes_its_part_of_cores_that_all_are_busy() -> None:
    assert predicted(BUSY, cores=1).step_s == pytest.approx(predicted(cores=1).step_s / 0.9)
    # Of two cores one is idle for a part of the step: there it takes nothing from anybody.
    longer = predicted(BUSY, cores=2).step_s / predicted(cores=2).step_s
    assert 1.01 < longer < 1 / 0.95 - 0.001
    assert predicted(BUSY).step_s == predicted().step_s  # each has a device
    again = Prediction.from_json(predicted(BUSY, cores=1).to_json())
    assert again.costs.background_threads == 0.05


def test_what_was_predicted_of_other_processes_and_threads_is_no_cause() -> None:
    prediction = predicted(BUSY, cores=1)
    run = measured(prediction, process_cpu_s=0.025 * prediction.step_s)  # each of two workers
    others = [{**parts, "others_cpu_s": 0.05 * run.step_s} for parts in run.parts_s]
    run = replace(run, parts_s=others)
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found["CPU time of sends and receives"] == pytest.approx(0.0)
    assert found[MORE_OTHERS] == pytest.approx(0.0)
    others = [{**parts, "others_cpu_s": 0.35 * run.step_s} for parts in run.parts_s]
    run = replace(run, parts_s=others)
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found[MORE_OTHERS] == pytest.approx(0.9 / 0.6 - 1)
    # Workers of three threads: as many cores are a third of what the places of workers are.
    run = replace(run, threads=3)
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found[MORE_OTHERS] == pytest.approx(0.9 / (0.95 - 0.35 / 3) - 1)


def test_time_of_the_training_thread_that_belongs_to_no_part_is_named() -> None:
    prediction = predicted(cores=1)
    run = measured(prediction, thread_cpu_s=1.4, process_cpu_s=1.4, compute_cpu_s=0.7)
    run = replace(run, step_s=prediction.step_s + 0.4)
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found[DISPATCH] == pytest.approx(
        0.4 / prediction.step_s
    )  # of both, one after the other
    assert found[REST] == pytest.approx(0.0)


def test_real_work_that_overran_its_emulated_time_is_named() -> None:
    prediction = predicted()
    run = replace(measured(prediction), step_s=prediction.step_s + 6.0, late_s=6.0)
    first, *others = causes(prediction, run, plan=PLAN, schedule=SCHEDULE)
    assert first.what.startswith("operations whose real work overran")
    assert first.share == pytest.approx(6.0 / prediction.step_s)
    assert all(abs(cause.share) < 1e-9 for cause in others)


def test_an_emulated_optimizer_is_not_taken_for_faster_than_stated() -> None:
    prediction = predicted(replace(COSTS, source="emulated"))
    run = measured(prediction, agree_cpu_s=0.0, update_cpu_s=1e-3)
    found = causes(prediction, run, plan=PLAN, schedule=SCHEDULE)
    assert all(abs(cause.share) < 1e-9 for cause in found)


def test_what_stands_at_the_end_of_a_step_is_told_by_part() -> None:
    prediction = predicted()
    run = measured(prediction, reduce_wall_s=0.3, agree_wall_s=0.1, turn_wall_s=0.2)
    waited = {
        **run.parts_s[0],
        "reduce_wall_s": 5.0,
        "agree_wall_s": 5.0,
    }  # for the last to come
    run = replace(run, step_s=run.step_s + 0.6, parts_s=[run.parts_s[0], waited])
    found = {c.what: c.share for c in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)}
    assert found[SUMS] == pytest.approx(0.3 / prediction.step_s)
    assert found["the exchange at the end of a step"] == pytest.approx(0.1 / prediction.step_s)
    assert found[TURN] == pytest.approx(0.2 / prediction.step_s)
    assert found[REST] == pytest.approx(0.0)


def test_the_error_is_that_of_the_median_step_without_the_first() -> None:
    prediction = predicted()
    steps = [99.0, 99.0, *(prediction.step_s * f for f in (1.0, 1.1, 1.2))]
    assert prediction_error(prediction, steps) == pytest.approx(0.1)
    assert prediction_error(prediction, steps[:2]) is None
    assert prediction_error(None, steps) is None


WARM = replace(COSTS, warm_up_s=(0.0, 2.0, 2.0, 0.0))


def test_a_step_of_the_warm_up_is_longer_by_what_routers_then_take_and_the_prediction_is_without() -> (
    None
):
    prediction, settled = predicted(WARM), predicted()
    assert prediction.step_s == settled.step_s
    # Each stage has one such layer: F 4 instead of 2, (4 + 1) times on the way through.
    assert prediction.warm_up_s == pytest.approx(5 * 2.0)
    assert Prediction.from_json(prediction.to_json()).warm_up_s == prediction.warm_up_s
    assert settled.warm_up_s == 0.0


def test_each_step_is_compared_with_what_is_predicted_for_as_many_routers_in_warm_up() -> None:
    prediction = predicted(WARM)
    shares = [1.0, 1.0, 1.0, 0.5, 0.0]
    steps = [1.1 * (prediction.step_s + share * prediction.warm_up_s) for share in shares]
    assert prediction_error(prediction, steps, warm_up=shares) == pytest.approx(0.1)
    assert prediction_error(prediction, steps) > 0.25


def test_the_warm_up_of_routers_is_no_cause_that_a_run_is_put_down_to() -> None:
    prediction = predicted(WARM)
    warm = predicted(WARM.warming_up(1.0))
    run = replace(measured(warm), warm_up=1.0)
    assert all(
        abs(cause.share) < 1e-9
        for cause in causes(prediction, run, plan=PLAN, schedule=SCHEDULE)
    )


def test_what_the_host_did_beside_its_workers_is_others() -> None:
    parts = [{"own_cpu_s": 1.0, "host_cpu_s": 2.5}, {"own_cpu_s": 1.0, "host_cpu_s": 2.5}]
    assert [own["others_cpu_s"] for own in with_others(parts, ["a", "a"])] == [0.5, 0.5]
    assert [own["others_cpu_s"] for own in with_others(parts, ["a", "b"])] == [1.5, 1.5]
