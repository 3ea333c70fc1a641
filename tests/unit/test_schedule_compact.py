"""Compact orders say what schedules say, take a few bytes an action, and simulate alike."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import BUILDERS, build, build_compact
from deepopt.schedule.compact import RowWriter, compact, expand, keep_microbatches
from deepopt.schedule.ir import Direction, Op, PlacementKind, place
from deepopt.schedule.simulate import CostTable, simulate, simulate_compact

DOWN, UP = Direction.DOWN, Direction.UP


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(sorted(BUILDERS)))
    kind = BUILDERS[name].placements[0]
    count = draw(st.integers(1, 9))
    down = count // 2 if kind is PlacementKind.MIRROR else count
    return {
        "name": name,
        "placement": place(kind, num_ranks=draw(st.integers(1, 5))),
        "directions": (DOWN,) * down + (UP,) * (count - down),
    }


def written(*steps: tuple[int, Op], microbatches: int, times: int = 1) -> str:
    writer = RowWriter(num_microbatches=microbatches)
    writer.add(*steps, times=times)
    line = build_compact(
        "1f1b",
        placement=place(PlacementKind.LINE, num_ranks=3),
        directions=(DOWN,) * microbatches,
    )
    return " ".join(str(line.action(code)) for code in writer.row)


@settings(max_examples=60, deadline=None)
@given(requests())
def test_an_order_survives_both_ways(request: dict[str, Any]) -> None:
    schedule = build(**request)
    short = compact(schedule)
    assert short == build_compact(**request)
    assert expand(short) == schedule
    assert short.num_actions == sum(map(len, schedule.actions))


@settings(max_examples=60, deadline=None)
@given(requests(), st.data(), st.booleans())
def test_both_forms_have_the_same_times(
    request: dict[str, Any], data: st.DataObject, updates: bool
) -> None:
    schedule = build(**request)
    num_stages, num_ranks = schedule.placement.num_stages, schedule.placement.num_ranks
    times = st.integers(0, 9).map(float)
    stages = st.tuples(*[times] * num_stages)
    costs = CostTable(
        forward_s=data.draw(stages),
        input_s=data.draw(stages),
        weight_s=data.draw(stages),
        latency_s=data.draw(times),
        transfer_s=data.draw(times),
        host_of=data.draw(st.tuples(*[st.integers(0, 2)] * num_ranks)),
        inter_host_transfer_s=data.draw(times),
        reduce_s=data.draw(stages) if updates else (),
        update_s=data.draw(stages) if updates else (),
    )
    whole, short = simulate(schedule, costs), simulate_compact(compact(schedule), costs)
    for spans, starts, ends, updated in zip(
        whole.spans, short.starts, short.ends, short.updates, strict=True
    ):
        assert [s.start_s for s in spans] == [*starts, *(s.start_s for s in updated)]
        assert [s.end_s for s in spans] == [*ends, *(s.end_s for s in updated)]
    assert (whole.busy_s, whole.makespan_s) == (short.busy_s, short.makespan_s)
    assert (whole.bubble, whole.steady_s) == (short.bubble, short.steady_s)
    assert whole.steady_s <= whole.makespan_s


def test_microbatches_count_up_for_each_stage_and_op() -> None:
    assert written((1, Op.F), (2, Op.F), (1, Op.F), microbatches=9, times=2) == (
        "1F0 2F0 1F1 1F2 2F1 1F3"
    )
    assert written((1, Op.F), microbatches=9, times=0) == ""
    assert written((1, Op.F), microbatches=9, times=-1) == ""


def test_a_whole_backward_counts_as_both_of_its_halves() -> None:
    writer = RowWriter(num_microbatches=9)
    writer.add((0, Op.B), times=3)
    writer.add((0, Op.I))
    assert writer.done(0, Op.I) == 4
    assert writer.done(0, Op.W) == 3


def test_microbatches_that_are_not_there_leave_no_trace() -> None:
    line = place(PlacementKind.LINE, num_ranks=3)
    many = build_compact("gpipe", placement=line, directions=(DOWN,) * 7)
    few = build_compact("gpipe", placement=line, directions=(DOWN,) * 4)
    assert keep_microbatches(many.rows, made_for=7, keep=4) == few.rows
    assert keep_microbatches(few.rows, made_for=4, keep=4) == few.rows


def test_a_compact_action_takes_four_bytes() -> None:
    line = place(PlacementKind.LINE, num_ranks=64)
    rows = build_compact("zb_h1", placement=line, directions=(DOWN,) * 256).rows
    assert {row.itemsize * len(row) for row in rows} == {4 * 3 * 256}


@pytest.mark.parametrize("microbatches", [32, 64, 512])
def test_1f1b_of_many_ranks_has_its_closed_form(microbatches: int) -> None:
    line = place(PlacementKind.LINE, num_ranks=64)
    schedule = build_compact("1f1b", placement=line, directions=(DOWN,) * microbatches)
    costs = CostTable.uniform(64, forward_s=2, input_s=3, weight_s=1)
    assert simulate_compact(schedule, costs).makespan_s == (microbatches + 63) * 6


def test_overlapped_steps_take_the_longest_span_of_a_rank() -> None:
    line = place(PlacementKind.LINE, num_ranks=4)
    costs = CostTable.uniform(4, forward_s=1, input_s=1, weight_s=1)
    timeline = simulate(build("zb_h2", placement=line, directions=(DOWN,) * 8), costs)
    assert timeline.steady_s == 8 * 3
    assert timeline.makespan_s == 8 * 3 + 3


def test_a_compact_deadlock_names_the_action() -> None:
    line = place(PlacementKind.LINE, num_ranks=2)
    schedule = build_compact("1f1b", placement=line, directions=(DOWN,) * 2)
    schedule.rows[0].reverse()
    with pytest.raises(ScheduleError, match="rank 0 waits for ever before 0B1"):
        simulate_compact(schedule, CostTable.uniform(2, forward_s=1, input_s=1, weight_s=1))
