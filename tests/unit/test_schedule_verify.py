"""Wrong schedules are refused with the action and the reason."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import build
from deepopt.schedule.ir import (
    Action,
    Direction,
    Op,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.lowering import lower
from deepopt.schedule.verify import find_fault, verify
from deepopt.schedule.verify_lowered import verify_lowered


def by_hand(
    *rows: str, kind: PlacementKind = PlacementKind.LINE, directions: str = ""
) -> Schedule:
    """A schedule from its printed rows; directions as d and u, all down when empty."""
    actions = tuple(tuple(parse_action(word) for word in row.split()) for row in rows)
    count = 1 + max(a.microbatch or 0 for row in actions for a in row)
    stages = 1 + max(a.stage for row in actions for a in row)
    per_rank = max(1, stages // len(rows)) if kind is PlacementKind.LINE else 1
    return Schedule(
        name="by_hand",
        placement=place(kind, num_ranks=len(rows), stages_per_rank=per_rank),
        directions=tuple(
            Direction.UP if letter == "u" else Direction.DOWN
            for letter in directions or "d" * count
        ),
        actions=actions,
    )


WRONG = {
    "a backward before its forward": (
        by_hand("0F0 0B1 0F1 0B0", "1F0 1B0 1F1 1B1"),
        "rank 0: 0B1 runs before 0F1",
    ),
    "a stage before the one before it on the same rank": (
        by_hand("1F0 0F0 1B0 0B0"),
        "rank 0: 1F0 runs before 0F0",
    ),
    "a weight gradient before the input gradient": (
        by_hand("0F0 0W0 0I0"),
        "rank 0: 0W0 runs before 0I0",
    ),
    "a preparation after the backward": (
        by_hand("0F0 0B0 0R0"),
        "rank 0: 0R0 runs after 0B0",
    ),
    "a preparation before the forward": (
        by_hand("0R0 0F0 0B0"),
        "rank 0: 0R0 runs before 0F0",
    ),
    "gradients out of order": (
        by_hand("0F0 0F1 0B1 0B0"),
        "rank 0: 0B1 runs before 0B0, but the gradients",
    ),
    "weight gradients out of order": (
        by_hand("0F0 0F1 0I0 0I1 0W1 0W0"),
        "rank 0: 0W1 runs before 0W0, but the gradients",
    ),
    "a forward that is missing": (
        by_hand("0F0 0B0 0F1 0B1", "1F0 1B0 1B1"),
        "rank 1: 1F1 is missing",
    ),
    "a backward that is missing": (
        by_hand("0F0 0F1 0B0"),
        "rank 0: 0B1 is missing: 0F1 has no backward",
    ),
    "half a backward": (by_hand("0F0 0I0"), "rank 0: 0W0 is missing beside 0I0"),
    "a gradient added twice": (
        by_hand("0F0 0I0 0W0 0B0"),
        "rank 0: 0B0 and 0I0 would add the same gradient twice",
    ),
    "an action twice": (by_hand("0F0 0F0 0B0"), "rank 0: 0F0 runs twice"),
    "an action on the wrong rank": (
        by_hand("0F0 0B0 1F0", "1B0"),
        "rank 0: 1F0 belongs to rank 1",
    ),
    "a send in a compute schedule": (
        by_hand("0F0 0SEND_F0 0B0", "1F0 1B0"),
        "rank 0: 0SEND_F0 is not a compute action",
    ),
    "two ranks that wait for each other": (
        by_hand("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
        "deadlock: 0B0 on rank 0 waits for 1B0 on rank 1, "
        "1F1 on rank 1 waits for 0F1 on rank 0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_schedule_is_refused_with_action_and_reason(case: str) -> None:
    schedule, reason = WRONG[case]
    with pytest.raises(ScheduleError, match=re.escape(reason)):
        verify(schedule)


def test_right_schedules_by_hand_pass() -> None:
    report = verify(by_hand("0F0 0F1 0R0 0B0 0I1 0W1", "1F0 1B0 1F1 1I1 1W1"))
    assert report.peak_activations == (2, 1)
    assert report.num_transfers == 4


def test_the_two_directions_of_one_stage_may_mix_their_gradients() -> None:
    verify(by_hand("0F0 0F1 0B1 0B0", kind=PlacementKind.MIRROR, directions="du"))


def test_more_activations_than_the_cap_are_refused() -> None:
    schedule = by_hand("0F0 0F1 0F2 0B0 0B1 0B2")
    verify(schedule, memory_cap=3)
    with pytest.raises(ScheduleError, match="rank 0: 0F2 would hold activations of 3"):
        verify(schedule, memory_cap=2)


def test_the_fault_names_rank_and_action_for_drawing() -> None:
    fault = find_fault(by_hand("0F0 0B0", "1B0 1F0"))
    assert fault is not None
    assert (fault.rank, fault.action) == (1, Action(1, Op.B, 0))


ONE_F_ONE_B = build(
    "1f1b",
    placement=place(PlacementKind.LINE, num_ranks=4),
    directions=(Direction.DOWN,) * 6,
)


def runs_to_its_end(schedule: Schedule) -> bool:
    """The slow and plain judgement: run whatever can run until nothing can."""
    left = [list(row) for row in schedule.actions]
    done: set[tuple[str, int, int | None]] = set()
    last: dict[tuple[int, Direction], int] = {}
    moved = True
    while moved:
        moved = False
        for row in left:
            while row:
                stage, op, microbatch = row[0].stage, row[0].op, row[0].microbatch
                needs = {("F", stage - 1, microbatch)} if stage else set()
                if op is Op.B:
                    needs = {("F", stage, microbatch), ("B", stage + 1, microbatch)}
                needs -= {("B", schedule.placement.num_stages, microbatch)}
                if not needs <= done:
                    break
                if op is Op.B:
                    lane = (stage, schedule.directions[microbatch or 0])
                    if last.get(lane, -1) > (microbatch or 0):
                        return False
                    last[lane] = microbatch or 0
                done.add((op.value, stage, microbatch))
                row.pop(0)
                moved = True
    return not any(left)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10)), min_size=1, max_size=3))
def test_swapped_actions_are_refused_exactly_when_they_matter(
    swaps: list[tuple[int, int]],
) -> None:
    rows = [list(row) for row in ONE_F_ONE_B.actions]
    for rank, index in swaps:
        rows[rank][index : index + 2] = rows[rank][index : index + 2][::-1]
    schedule = Schedule(
        name="swapped",
        placement=ONE_F_ONE_B.placement,
        directions=ONE_F_ONE_B.directions,
        actions=tuple(map(tuple, rows)),
    )
    assert (find_fault(schedule) is None) == runs_to_its_end(schedule)


def test_every_single_action_that_is_left_out_is_noticed() -> None:
    for rank, row in enumerate(ONE_F_ONE_B.actions):
        for index, action in enumerate(row):
            rows = list(ONE_F_ONE_B.actions)
            rows[rank] = row[:index] + row[index + 1 :]
            fault = find_fault(
                Schedule(
                    name="cut",
                    placement=ONE_F_ONE_B.placement,
                    directions=ONE_F_ONE_B.directions,
                    actions=tuple(rows),
                )
            )
            assert fault is not None
            assert (fault.rank, fault.action) == (rank, action)


def lowered(schedule: Schedule) -> list[list[Action]]:
    return [list(row) for row in lower(schedule, reduce=True)]


def swap(row: list[Action], first: str, second: str) -> None:
    i, j = row.index(parse_action(first)), row.index(parse_action(second))
    row[i], row[j] = row[j], row[i]


def test_receives_in_another_order_than_the_sends_are_refused() -> None:
    schedule = by_hand("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    rows = lowered(schedule)
    rows[1].remove(parse_action("1RECV_F1"))
    rows[1].insert(0, parse_action("1RECV_F1"))
    with pytest.raises(ScheduleError, match="1RECV_F1 meets 0SEND_F0"):
        verify_lowered(schedule, rows=rows)


@pytest.mark.parametrize(
    ("rank", "left_out", "reason"),
    [
        (0, "0SEND_F1", "rank 1: 1RECV_F1 is never sent by rank 0"),
        (1, "1RECV_F1", "rank 1: 1F1 runs before 1RECV_F1"),
        (1, "1REDUCE", "rank 1: 1REDUCE is missing"),
    ],
)
def test_a_transfer_that_is_left_out_is_refused(rank: int, left_out: str, reason: str) -> None:
    schedule = by_hand("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    rows = lowered(schedule)
    rows[rank].remove(parse_action(left_out))
    with pytest.raises(ScheduleError, match=re.escape(reason)):
        verify_lowered(schedule, rows=rows)


def test_a_send_before_its_maker_is_refused() -> None:
    schedule = by_hand("0F0 0B0", "1F0 1B0")
    rows = lowered(schedule)
    swap(rows[0], "0F0", "0SEND_F0")
    with pytest.raises(ScheduleError, match="rank 0: 0SEND_F0 is sent before it is made"):
        verify_lowered(schedule, rows=rows)


def test_lists_that_need_two_sends_under_way_are_refused_with_one() -> None:
    # Each rank sends two tensors before it receives any: two channels fill up.
    schedule = by_hand(
        "0F0 0F1 1F2 1F3 1B2 1B3 0B0 0B1",
        "0F2 0F3 1F0 1F1 1B0 1B1 0B2 0B3",
        kind=PlacementKind.MIRROR,
        directions="dduu",
    )
    rows = lowered(schedule)
    verify_lowered(schedule, rows=rows, buffers=1)
    for row in rows:
        late = [a for a in row if a.op is Op.RECV_F]
        rest = [a for a in row if a.op is not Op.RECV_F]
        first_user = next(i for i, a in enumerate(rest) if a.stage == 1)
        row[:] = rest[:first_user] + late + rest[first_user:]
    with pytest.raises(ScheduleError, match=r"deadlock with 1 send\(s\) under way"):
        verify_lowered(schedule, rows=rows, buffers=1)
    verify_lowered(schedule, rows=rows, buffers=2)
