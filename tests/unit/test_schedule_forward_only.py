"""Forwards alone: every micro-batch through every stage, and no order of ranks that waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepopt.schedule.forward_only import forward_only
from deepopt.schedule.ir import Op, Placement, PlacementKind, Schedule, place
from deepopt.schedule.lowering import lower

placements = st.builds(
    place,
    st.sampled_from(PlacementKind),
    num_ranks=st.integers(1, 6),
    stages_per_rank=st.integers(1, 3),
)
schedules = st.builds(forward_only, placements, num_microbatches=st.integers(0, 12))


@given(schedules)
def test_every_microbatch_goes_through_every_stage_where_it_lies(schedule: Schedule) -> None:
    found = [
        (action.stage, action.microbatch, rank)
        for rank, row in enumerate(schedule.actions)
        for action in row
    ]
    expected = {
        (stage, microbatch, schedule.placement.rank_of(stage, direction))
        for microbatch, direction in enumerate(schedule.directions)
        for stage in range(schedule.placement.num_stages)
    }
    assert sorted(found) == sorted(expected)


@given(schedules)
def test_ranks_that_wait_for_what_they_need_all_end(schedule: Schedule) -> None:
    rows = [list(row) for row in lower(schedule, reduce=False)]
    sent: set[tuple[int, int | None]] = set()
    while any(rows):
        before = sum(map(len, rows))
        for row in rows:
            while row and (
                row[0].op is not Op.RECV_F or (row[0].stage - 1, row[0].microbatch) in sent
            ):
                action = row.pop(0)
                if action.op is Op.SEND_F:
                    sent.add((action.stage, action.microbatch))
        assert sum(map(len, rows)) < before, "nobody can go on"


@given(st.integers(1, 4), st.integers(2, 12))
def test_both_copies_of_a_mirror_have_work(num_ranks: int, num_microbatches: int) -> None:
    placement: Placement = place(PlacementKind.MIRROR, num_ranks=num_ranks)
    schedule = forward_only(placement, num_microbatches=num_microbatches)
    ends = {placement.rank_of(num_ranks - 1, direction) for direction in schedule.directions}
    assert ends == {0, num_ranks - 1}
