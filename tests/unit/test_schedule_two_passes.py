"""All forwards, then all backwards: a correct schedule whose first pass needs nothing of the second."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepopt.schedule.ir import Direction, Op, PlacementKind, Schedule, place
from deepopt.schedule.lowering import lower
from deepopt.schedule.run_ahead import run_ahead
from deepopt.schedule.two_passes import two_passes
from deepopt.schedule.verify import verify
from deepopt.schedule.verify_lowered import verify_lowered


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(PlacementKind))
    placement = place(kind, num_ranks=draw(st.integers(1, 6)))
    down = (Direction.DOWN,) * draw(st.integers(1, 6))
    up = (Direction.UP,) * draw(st.integers(1, 6)) if placement.num_directions == 2 else ()
    return two_passes(placement, directions=down + up)


@given(schedules())
def test_it_keeps_the_rules_of_schedules_and_of_transfers(schedule: Schedule) -> None:
    verify(schedule)
    verify_lowered(schedule, rows=lower(schedule, reduce=True))


@given(schedules())
def test_every_rank_may_stop_between_the_passes(schedule: Schedule) -> None:
    rows = lower(schedule, reduce=True)
    for row, ahead in zip(rows, run_ahead(schedule, rows), strict=True):
        first, second = row[: ahead.num_actions], row[ahead.num_actions :]
        assert {action.op for action in second} <= {Op.B, Op.SEND_B, Op.RECV_B, Op.REDUCE}
        assert {action.op for action in first} <= {Op.F, Op.SEND_F, Op.RECV_F}
        assert {*ahead.arriving} <= {*first}
