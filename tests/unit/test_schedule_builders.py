"""Every builder gives a right schedule for every number of ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import BUILDERS, build
from deepopt.schedule.ir import (
    SEND_OPS,
    Action,
    Direction,
    Op,
    Placement,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.lowering import count_transfers, lower
from deepopt.schedule.verify import peak_activations, verify
from deepopt.schedule.verify_lowered import verify_lowered

DOWN, UP = Direction.DOWN, Direction.UP


def make(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    kind: PlacementKind | None = None,
    stages_per_rank: int = 1,
    num_down: int | None = None,
) -> Schedule:
    kind = kind or BUILDERS[name].placements[0]
    placement = place(kind, num_ranks=ranks, stages_per_rank=stages_per_rank)
    if kind is not PlacementKind.MIRROR:
        num_down = microbatches
    elif num_down is None:
        num_down = microbatches // 2
    directions = (DOWN,) * num_down + (UP,) * (microbatches - num_down)
    return build(name, placement=placement, directions=directions)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(BUILDERS)))
    builder = BUILDERS[name]
    kind = draw(st.sampled_from(builder.placements))
    several = kind is PlacementKind.LINE and builder.most_stages_per_rank is None
    microbatches = draw(st.integers(1, 16))
    return make(
        name,
        ranks=draw(st.integers(1, 8)),
        microbatches=microbatches,
        kind=kind,
        stages_per_rank=draw(st.integers(1, 3)) if several else 1,
        num_down=draw(st.integers(0, microbatches)),
    )


@settings(max_examples=250, deadline=None)
@given(schedules())
def test_every_builder_is_verified_for_any_ranks_and_microbatches(schedule: Schedule) -> None:
    verify(schedule)


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(1, 3), st.booleans())
def test_lowered_lists_need_only_one_send_under_way(
    schedule: Schedule, buffers: int, reduce: bool
) -> None:
    rows = lower(schedule, reduce=reduce)
    verify_lowered(schedule, rows=rows, buffers=buffers)
    sends = sum(action.op in SEND_OPS for row in rows for action in row)
    assert count_transfers(schedule) == sends


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_one_microbatch_is_enough(name: str, ranks: int) -> None:
    verify(make(name, ranks=ranks, microbatches=1))


def test_1f1b_of_two_ranks_is_the_textbook_order() -> None:
    schedule = make("1f1b", ranks=2, microbatches=3)
    assert str(schedule) == "0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2"


def test_gpipe_runs_all_forwards_first() -> None:
    assert str(make("gpipe", ranks=1, microbatches=2)) == "0F0 0F1 0B0 0B1"


def test_interleaved_takes_a_round_of_p_microbatches_through_each_of_its_stages() -> None:
    schedule = make("interleaved_1f1b", ranks=2, microbatches=4, stages_per_rank=2)
    first = [str(a) for a in schedule.actions[0] if a.op is Op.F]
    assert first == ["0F0", "0F1", "2F0", "2F1", "0F2", "0F3", "2F2", "2F3"]


PEAKS = {
    "gpipe": lambda p, m: m,
    "1f1b": lambda p, m: min(p, m),
    "zb_h1": lambda p, m: min(p, m),
    "zb_h2": lambda p, m: min(2 * p - 1, m),
    "zb_h3": lambda p, m: min(3 * p - 2, m),
    "zb_v": lambda p, m: 2 * min(p, m),
    "bi_stream": lambda p, m: min(p + 1, m),
}


@pytest.mark.parametrize("name", sorted(PEAKS))
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 2), (4, 16), (7, 32)])
def test_activations_stay_within_the_published_bound(
    name: str, ranks: int, microbatches: int
) -> None:
    peak = max(peak_activations(make(name, ranks=ranks, microbatches=microbatches)))
    assert peak <= PEAKS[name](ranks, microbatches)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 13])
def test_v_half_holds_half_of_what_1f1b_holds(ranks: int) -> None:
    schedule = make("v_half", ranks=ranks, microbatches=4 * ranks)
    assert max(peak_activations(schedule)) == 2 * ((ranks + 2) // 2)


@pytest.mark.parametrize("ranks", [3, 5, 7])
def test_the_middle_rank_of_an_odd_mirror_serves_both_directions_with_one_copy(
    ranks: int,
) -> None:
    schedule = make("bi_stream", ranks=ranks, microbatches=8)
    middle = ranks // 2
    assert schedule.placement.stages_of(middle) == (middle,)
    forwards = {a.microbatch for a in schedule.actions[middle] if a.op is Op.F}
    assert forwards == set(range(8))


def test_bi_stream_works_when_one_direction_is_empty() -> None:
    verify(make("bi_stream", ranks=4, microbatches=3, num_down=0))


def test_lowering_sends_after_the_maker_and_receives_before_the_user() -> None:
    rows = lower(make("1f1b", ranks=2, microbatches=1), reduce=True)
    assert [str(a) for a in rows[0]] == ["0F0", "0SEND_F0", "0RECV_B0", "0B0", "0REDUCE"]
    assert [str(a) for a in rows[1]] == ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1REDUCE"]


def test_nothing_is_sent_inside_a_rank() -> None:
    rows = lower(make("zb_v", ranks=1, microbatches=3), reduce=False)
    assert {a.op for a in rows[0]} == {Op.F, Op.I, Op.W}


def test_every_held_stage_is_reduced_once_also_without_a_microbatch() -> None:
    schedule = make("bi_stream", ranks=3, microbatches=2, num_down=2)
    for rank, row in enumerate(lower(schedule, reduce=True)):
        reduced = sorted(a.stage for a in row if a.op is Op.REDUCE)
        assert tuple(reduced) == schedule.placement.stages_of(rank)


@pytest.mark.parametrize("num_down", [2, 3, 4, 5])
def test_ranks_that_share_stages_start_to_reduce_them_in_one_order(num_down: int) -> None:
    rows = lower(make("bi_stream", ranks=4, microbatches=8, num_down=num_down), reduce=True)
    orders = [[a.stage for a in row if a.op is Op.REDUCE] for row in rows]
    assert orders == orders[::-1]


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ScheduleError, match="there is no schedule '1f1bb'") as error:
        build("1f1bb", placement=place(PlacementKind.LINE, num_ranks=2), directions=(DOWN,))
    assert "did you mean '1f1b'?" in error.value.remedy


@pytest.mark.parametrize(
    ("name", "placement", "remedy"),
    [
        ("bi_stream", place(PlacementKind.LINE, num_ranks=2), "placement mirror"),
        ("1f1b", place(PlacementKind.MIRROR, num_ranks=2), "bi_stream"),
        ("zb_v", place(PlacementKind.LINE, num_ranks=2), "placement v"),
        (
            "1f1b",
            place(PlacementKind.LINE, num_ranks=2, stages_per_rank=2),
            "interleaved_1f1b",
        ),
    ],
)
def test_a_builder_that_does_not_fit_the_placement_says_which_would(
    name: str, placement: Placement, remedy: str
) -> None:
    with pytest.raises(ScheduleError, match=f"schedule {name}") as error:
        build(name, placement=placement, directions=(DOWN,))
    assert remedy in error.value.remedy


def test_a_microbatch_cannot_go_up_a_line() -> None:
    with pytest.raises(ScheduleError, match="micro-batch 1 goes up"):
        build("1f1b", placement=place(PlacementKind.LINE, num_ranks=2), directions=(DOWN, UP))


def test_no_microbatch_is_refused() -> None:
    with pytest.raises(ScheduleError, match="at least one micro-batch"):
        build("1f1b", placement=place(PlacementKind.LINE, num_ranks=2), directions=())


@given(
    st.integers(0, 200),
    st.sampled_from([op for op in Op if op is not Op.REDUCE]),
    st.integers(0, 200),
)
def test_an_action_prints_and_parses(stage: int, op: Op, microbatch: int) -> None:
    action = Action(stage, op, microbatch)
    assert parse_action(str(action)) == action
