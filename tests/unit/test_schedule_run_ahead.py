"""How far ranks may run ahead: beginnings that hold forwards alone and fit together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import (
    RECEIVE_OPS,
    SEND_OPS,
    Direction,
    Op,
    PlacementKind,
    Schedule,
    directions_of,
    place,
)
from deepopt.schedule.lowering import Routes, lower
from deepopt.schedule.run_ahead import run_ahead


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(list(PlacementKind)))
    per_rank = draw(st.integers(1, 3)) if kind is PlacementKind.LINE else 1
    placement = place(kind, num_ranks=draw(st.integers(1, 6)), stages_per_rank=per_rank)
    names = [n for n in BUILDERS if misfit(n, placement=placement) is None]
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=2))
    directions = directions_of(sizes, num_directions=placement.num_directions)
    return build(draw(st.sampled_from(names)), placement=placement, directions=directions)


def test_ranks_of_1f1b_run_ahead_by_their_warm_up() -> None:
    schedule = build(
        "1f1b",
        placement=place(PlacementKind.LINE, num_ranks=4),
        directions=(Direction.DOWN,) * 8,
    )
    rows = lower(schedule, reduce=True)
    plans = run_ahead(schedule, rows)
    forwards = [
        sum(action.op is Op.F for action in row[: plan.num_actions])
        for row, plan in zip(rows, plans, strict=True)
    ]
    assert forwards == [4, 3, 2, 1]
    # The last rank has taken one micro-batch in; one more is on its way to it.
    assert [str(action) for action in plans[3].arriving] == ["3RECV_F0", "3RECV_F1"]


@given(schedules())
def test_what_runs_ahead_can_be_forgotten(schedule: Schedule) -> None:
    rows = lower(schedule, reduce=True)
    plans = run_ahead(schedule, rows)
    message = Routes(schedule).message
    sent, received, arriving = set(), set(), set()
    for row, plan in zip(rows, plans, strict=True):
        ahead = row[: plan.num_actions]
        assert all(action.op in (Op.F, Op.R, Op.SEND_F, Op.RECV_F) for action in ahead)
        sent |= {message(a) for a in ahead if a.op in SEND_OPS}
        received |= {message(a) for a in ahead if a.op in RECEIVE_OPS}
        arriving |= {message(a) for a in plan.arriving}
    assert received <= sent  # nobody waits for what is sent later
    assert arriving == sent  # everything sent is taken in, nothing else is waited for


@given(schedules())
def test_a_channel_delivers_what_runs_ahead_before_all_else(schedule: Schedule) -> None:
    rows = lower(schedule, reduce=True)
    routes = Routes(schedule)
    for row, plan in zip(rows, run_ahead(schedule, rows), strict=True):
        by_channel: dict[object, list[bool]] = {}
        for action in row:
            if action.op in RECEIVE_OPS:
                by_channel.setdefault(routes.channel(action), []).append(
                    action in plan.arriving
                )
        for flags in by_channel.values():
            assert flags == sorted(flags, reverse=True)
