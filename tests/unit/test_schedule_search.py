"""Searched orders: right, within memory, never slower than the classical ones, repeatable."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.coding import CodedProblem
from deepopt.schedule.ir import Action, Direction, Op, Placement, PlacementKind, Schedule, place
from deepopt.schedule.list_scheduler import ListRules, Prefer, list_schedule
from deepopt.schedule.local_search import improve
from deepopt.schedule.memory import Memory, peaks
from deepopt.schedule.search import search
from deepopt.schedule.simulate import CostTable, simulate
from deepopt.schedule.verify import peak_activations, verify

DOWN, UP = Direction.DOWN, Direction.UP
LAYER = (20.0, 22.0, 16.0)  # measured F, I, W of a transformer layer, in milliseconds
LITTLE = 30_000


def directions(placement: Placement, microbatches: int) -> tuple[Direction, ...]:
    down = microbatches if placement.up is None else (microbatches + 1) // 2
    return (DOWN,) * down + (UP,) * (microbatches - down)


def even(placement: Placement, ops: tuple[float, float, float] = LAYER) -> CostTable:
    share = placement.num_ranks / placement.num_stages
    forward, inputs, weight = (share * time for time in ops)
    return CostTable.uniform(
        placement.num_stages, forward_s=forward, input_s=inputs, weight_s=weight
    )


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    kind = draw(st.sampled_from(list(PlacementKind)))
    stages = draw(st.integers(1, 2)) if kind is PlacementKind.LINE else 1
    return place(kind, num_ranks=draw(st.integers(1, 4)), stages_per_rank=stages)


@st.composite
def memories(draw: st.DrawFn, placement: Placement) -> Memory:
    """Sizes by stage, and for each rank what it needs at least and some more."""
    num_stages = placement.num_stages
    kept = draw(st.tuples(*[st.integers(1, 4).map(float)] * num_stages))
    more = draw(st.tuples(*[st.integers(0, 4).map(float)] * num_stages))
    caps = []
    for rank in range(placement.num_ranks):
        down = [s for s in range(num_stages) if placement.down[s] == rank]
        up = [s for s in range(num_stages) if placement.up and placement.up[s] == rank]
        least = sum(kept[s] for s in (*down, *up)) + max(more[s] for s in (*down, *up))
        caps.append(least + draw(st.integers(0, 12)))
    full = tuple(a + b for a, b in zip(kept, more, strict=True))
    return Memory(kept=kept, full=full, caps=tuple(caps))


@st.composite
def tables(draw: st.DrawFn, placement: Placement) -> CostTable:
    times = st.integers(1, 9).map(float)
    stages = st.tuples(*[times] * placement.num_stages)
    prepare = draw(
        st.just(()) | st.tuples(*[st.integers(0, 6).map(float)] * placement.num_stages)
    )
    return CostTable(
        prepare_s=prepare,
        forward_s=draw(stages),
        input_s=draw(stages),
        weight_s=draw(stages),
        rank_factor=draw(st.tuples(*[times] * placement.num_ranks)),
        latency_s=draw(st.integers(0, 5).map(float)),
        transfer_s=draw(st.integers(0, 2).map(float)),
        host_of=draw(st.tuples(*[st.integers(0, 1)] * placement.num_ranks)),
        inter_host_latency_s=draw(st.integers(0, 9).map(float)),
    )


@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_a_search_is_right_and_never_slower_than_the_best_builder(
    data: st.DataObject, microbatches: int
) -> None:
    placement = data.draw(placements())
    costs = data.draw(tables(placement))
    ways = directions(placement, microbatches)
    result = search(placement, directions=ways, costs=costs, effort=2_000)
    verify(result.schedule)
    assert simulate(result.schedule, costs).makespan_s == result.makespan_s
    fitting = [name for name in BUILDERS if misfit(name, placement=placement) is None]
    fastest = min(
        simulate(build(name, placement=placement, directions=ways), costs).makespan_s
        for name in fitting
    )
    assert result.makespan_s <= fastest == result.builder_makespan_s
    assert result.lower_bound_s <= result.makespan_s * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_no_builder_beats_the_bound(data: st.DataObject, microbatches: int) -> None:
    placement = data.draw(placements())
    costs = data.draw(tables(placement))
    ways = directions(placement, microbatches)
    bound = lower_bound_s(placement, directions=ways, costs=costs)
    for name in BUILDERS:
        if misfit(name, placement=placement) is None:
            schedule = build(name, placement=placement, directions=ways)
            assert bound <= simulate(schedule, costs).makespan_s * (1 + 1e-9)


def test_the_bound_is_reached_where_an_order_is_known_to_be_best() -> None:
    placement = place(PlacementKind.LINE, num_ranks=4)
    ways, costs = directions(placement, 8), even(placement, (1, 1, 1))
    bound = lower_bound_s(placement, directions=ways, costs=costs)
    schedule = build("zb_h1", placement=placement, directions=ways)
    assert simulate(schedule, costs).makespan_s == bound == 8 * 3 + 3


def test_the_bound_counts_the_update_of_every_held_stage() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=2)
    plain = CostTable.uniform(2, forward_s=1, input_s=1, weight_s=1)
    charged = CostTable(forward_s=(1, 1), input_s=(1, 1), weight_s=(1, 1), update_s=(3.0, 4.0))
    ways = directions(placement, 4)
    difference = lower_bound_s(placement, directions=ways, costs=charged) - lower_bound_s(
        placement, directions=ways, costs=plain
    )
    assert difference == 7


@pytest.mark.parametrize(
    ("kind", "ranks", "microbatches", "memory_cap", "gap"),
    [
        (PlacementKind.MIRROR, 4, 8, 5, 0.001),
        (PlacementKind.MIRROR, 4, 16, 5, 0.005),
        (PlacementKind.V, 4, 8, 8, 0.01),
        (PlacementKind.LINE, 4, 8, 7, 0.001),
    ],
)
def test_searched_orders_come_close_to_the_bound(
    kind: PlacementKind, ranks: int, microbatches: int, memory_cap: int, gap: float
) -> None:
    placement = place(kind, num_ranks=ranks)
    result = search(
        placement,
        directions=directions(placement, microbatches),
        costs=even(placement),
        memory_cap=memory_cap,
        effort=10 * LITTLE,
    )
    assert result.gap <= gap
    assert max(result.peak_activations) <= memory_cap


def test_a_slow_rank_is_searched_around() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=4)
    slow = replace(even(placement), rank_factor=(1.0, 1.2, 1.0, 1.1), latency_s=4.0)
    ways = directions(placement, 8)
    result = search(placement, directions=ways, costs=slow, memory_cap=5, effort=LITTLE)
    assert result.makespan_s < result.builder_makespan_s


def test_the_same_inputs_give_the_same_order() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=3)
    first, second = (
        search(
            placement,
            directions=directions(placement, 6),
            costs=even(placement),
            effort=LITTLE,
            seed=5,
        )
        for _ in range(2)
    )
    assert first == second


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 7))
def test_sizes_in_bytes_are_kept_to_and_the_bound_still_holds(
    data: st.DataObject, microbatches: int
) -> None:
    placement = data.draw(placements())
    costs = data.draw(tables(placement))
    memory = data.draw(memories(placement))
    ways = directions(placement, microbatches)
    result = search(placement, directions=ways, costs=costs, memory=memory, effort=2_000)
    verify(result.schedule, memory=memory)
    held = peaks(result.schedule, memory)
    assert all(peak <= cap for peak, cap in zip(held, memory.caps, strict=True))
    assert result.lower_bound_s <= result.makespan_s * (1 + 1e-9)


def test_recomputation_runs_in_bubbles_before_the_gradient_arrives() -> None:
    placement = place(PlacementKind.LINE, num_ranks=4)
    costs = replace(even(placement), prepare_s=(20.0,) * 4)
    result = search(placement, directions=(DOWN,) * 8, costs=costs, memory_cap=4, effort=LITTLE)
    spans = {
        span.action: span for row in simulate(result.schedule, costs).spans for span in row
    }
    backward = {
        (action.stage, action.microbatch): span.start_s
        for action, span in spans.items()
        if action.op in (Op.I, Op.B)
    }
    ahead = [
        action
        for action, span in spans.items()
        if action.op is Op.R and span.end_s < backward[action.stage, action.microbatch]
    ]
    assert ahead
    paid_late = simulate(
        build("zb_h1", placement=placement, directions=(DOWN,) * 8), costs
    ).makespan_s
    assert result.makespan_s < paid_late <= result.builder_makespan_s * (1 + 1e-9)


def test_a_backward_without_its_preparation_pays_for_it() -> None:
    placement = place(PlacementKind.LINE, num_ranks=1)
    costs = CostTable(forward_s=(1.0,), input_s=(2.0,), weight_s=(4.0,), prepare_s=(8.0,))
    f, r, i, w, b = (Action(0, op, 0) for op in (Op.F, Op.R, Op.I, Op.W, Op.B))
    for row in ((f, r, i, w), (f, i, w), (f, b), (f, r, b)):
        schedule = Schedule(name="own", placement=placement, directions=(DOWN,), actions=(row,))
        assert simulate(schedule, costs).makespan_s == 15.0


def test_what_is_recomputed_is_held_from_its_preparation_on() -> None:
    placement = place(PlacementKind.LINE, num_ranks=1)
    memory = Memory(kept=(1.0,), full=(5.0,), caps=(6.0,))
    ways = (DOWN,) * 2
    first, second = (
        [Action(0, op, index) for op in (Op.F, Op.R, Op.I, Op.W)] for index in range(2)
    )

    def schedule(*row: Action) -> Schedule:
        return Schedule(name="own", placement=placement, directions=ways, actions=(row,))

    apart = schedule(*first, *second)
    assert peaks(apart, memory) == (5.0,)
    both = schedule(first[0], second[0], *first[1:], *second[1:])
    assert peaks(both, memory) == (6.0,)
    together = schedule(first[0], second[0], first[1], second[1], *first[2:], *second[2:])
    with pytest.raises(ScheduleError, match=r"0R1 would hold activations of 10, .* room for 6"):
        verify(together, memory=memory)


def test_a_cap_binds_the_bound_too() -> None:
    placement = place(PlacementKind.V, num_ranks=8)
    ways, costs = directions(placement, 16), even(placement)
    memory = Memory.counted(placement, cap=16)
    bound = lower_bound_s(placement, directions=ways, costs=costs, memory=memory)
    assert bound > lower_bound_s(placement, directions=ways, costs=costs)
    schedule = build("zb_v", placement=placement, directions=ways)
    assert peak_activations(schedule) == (16,) * 8
    assert simulate(schedule, costs).makespan_s == pytest.approx(bound)  # it is the best


def test_memory_that_holds_nothing_is_refused() -> None:
    placement = place(PlacementKind.V, num_ranks=2)
    with pytest.raises(ScheduleError, match="no order of 4 micro-batches fits the memory of 1"):
        search(
            placement,
            directions=(DOWN,) * 4,
            costs=even(placement),
            memory_cap=1,
            effort=LITTLE,
        )


def test_a_cap_that_no_builder_fits_is_met_by_a_found_order() -> None:
    placement = place(PlacementKind.LINE, num_ranks=4, stages_per_rank=2)
    result = search(
        placement,
        directions=(DOWN,) * 8,
        costs=even(placement),
        memory_cap=5,
        effort=LITTLE,
    )
    assert result.builder is None
    assert max(result.peak_activations) <= 5


KEYS = list(itertools.product(Prefer, Prefer))


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    st.integers(1, 7),
    st.sampled_from(KEYS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 9),
    st.integers(0, 4),
)
def test_the_list_scheduler_never_starves_and_keeps_every_cap(
    data: st.DataObject,
    microbatches: int,
    keys: tuple[Prefer, Prefer],
    split: bool,
    forward_first: bool,
    backlog: int | None,
    latency: int,
    room: int,
) -> None:
    placement = data.draw(placements())
    ways = directions(placement, microbatches)
    copies = [*placement.down, *(placement.up or ())]
    streams = max(copies.count(rank) for rank in range(placement.num_ranks))
    rank_cap = streams + room
    cap = data.draw(st.integers(1, 4))
    rules = ListRules(
        duration=lambda stage, op, rank: 0.0 if op is Op.R else 1.0 + stage % 3 + (op is Op.W),
        cap=lambda stage, direction: cap,
        split=split,
        hop=lambda source, target: latency,
        memory=Memory.counted(placement, cap=rank_cap),
        forward=keys[0],
        backward=keys[1],
        forward_first=forward_first,
        weight_backlog=backlog,
        weight_patience=0.5,
    )
    order = list_schedule(placement, directions=ways, rules=rules)
    schedule = Schedule(name="listed", placement=placement, directions=ways, actions=order)
    verify(schedule, memory_cap=rank_cap)
    assert max(peak_activations(schedule)) <= min(rank_cap, cap * streams)


def test_a_rank_cap_below_one_slot_per_stream_is_refused() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=2)
    rules = ListRules(
        duration=lambda stage, op, rank: 0.0 if op is Op.R else 1.0,
        cap=lambda stage, direction: 1,
        split=True,
        memory=Memory.counted(placement, cap=1),
    )
    with pytest.raises(
        ScheduleError, match=r"works on 2 streams of micro-batches, which hold 2 .* may hold 1"
    ):
        list_schedule(placement, directions=(DOWN, UP), rules=rules)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(0, 3))
def test_local_search_only_improves_and_keeps_the_memory(
    data: st.DataObject, microbatches: int, seed: int
) -> None:
    placement = data.draw(placements())
    costs = data.draw(tables(placement))
    ways = directions(placement, microbatches)
    name = next(name for name in BUILDERS if misfit(name, placement=placement) is None)
    schedule = build(name, placement=placement, directions=ways)
    cap = max(peak_activations(schedule))
    problem = CodedProblem(
        placement,
        directions=ways,
        costs=costs,
        memory=Memory.counted(placement, cap=cap),
    )
    rows = problem.encode(schedule)
    before = problem.ends(rows)
    assert before is not None
    better = improve(problem, rows, effort=3_000, seed=seed)
    after = problem.ends(better)
    assert after is not None
    assert max(after) <= max(before)
    improved = Schedule(
        name="improved", placement=placement, directions=ways, actions=problem.decode(better)
    )
    verify(improved, memory_cap=cap)


def test_coded_times_are_the_simulators() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=4)
    ways = directions(placement, 7)
    costs = replace(even(placement), host_of=(0, 0, 1, 1), inter_host_latency_s=3.0)
    schedule = build("bi_stream", placement=placement, directions=ways)
    problem = CodedProblem(
        placement,
        directions=ways,
        costs=costs,
        memory=Memory.counted(placement, cap=None),
    )
    rows = problem.encode(schedule)
    ends = problem.ends(rows)
    assert ends is not None
    assert max(ends) == simulate(schedule, costs).makespan_s
    rows[0].reverse()
    assert problem.ends(rows) is None


def test_steps_that_overlap_are_searched_by_their_distance() -> None:
    """A step of ZB-H3 alone is slow; among others no rank of it ever waits, latency or not."""
    placement = place(PlacementKind.LINE, num_ranks=4)
    costs = CostTable.uniform(4, forward_s=20, input_s=22, weight_s=16, latency_s=2)
    directions = (Direction.DOWN,) * 16
    alone = search(placement, directions=directions, costs=costs, effort=0)
    among = search(placement, directions=directions, costs=costs, effort=0, overlap=True)
    assert among.schedule.name == "zb_h3"
    assert among.makespan_s == among.lower_bound_s == 16 * (20 + 22 + 16)
    assert alone.makespan_s > among.makespan_s
    capped = search(
        placement, directions=directions, costs=costs, effort=0, overlap=True, memory_cap=4
    )
    assert max(capped.peak_activations) <= 4
    assert among.makespan_s < capped.makespan_s
