"""Orders rebuilt from both ends: right, within memory, never slower, close to the bound, repeatable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.coding import CodedProblem
from deepopt.schedule.forward_backward import ACTIONS_PER_ROUND, rebuild
from deepopt.schedule.ir import Direction, PlacementKind, Schedule, place
from deepopt.schedule.list_scheduler import ListRules, fuse_first_stage, list_schedule
from deepopt.schedule.memory import Memory
from deepopt.schedule.rule_search import search_rules
from deepopt.schedule.simulate import CostTable
from deepopt.schedule.step_end import StepEnd
from deepopt.schedule.verify import verify

DOWN, UP = Direction.DOWN, Direction.UP


@st.composite
def problems(draw: st.DrawFn) -> CodedProblem:
    """Any placement, with R, links, updates and memory that may be as tight as it can be."""
    kind = draw(st.sampled_from(list(PlacementKind)))
    per_rank = draw(st.integers(1, 2)) if kind is PlacementKind.LINE else 1
    placement = place(kind, num_ranks=draw(st.integers(2, 4)), stages_per_rank=per_rank)
    stages, ranks = placement.num_stages, placement.num_ranks
    times = st.integers(1, 9).map(float)
    none_or_some = st.integers(0, 4).map(float)
    kept = draw(st.tuples(*[st.integers(1, 4).map(float)] * stages))
    more = draw(st.tuples(*[none_or_some] * stages))
    costs = CostTable(
        forward_s=draw(st.tuples(*[times] * stages)),
        input_s=draw(st.tuples(*[times] * stages)),
        weight_s=draw(st.tuples(*[times] * stages)),
        prepare_s=draw(st.just(()) | st.tuples(*[none_or_some] * stages)),
        update_s=draw(st.just(()) | st.tuples(*[none_or_some] * stages)),
        reduce_s=draw(st.just(()) | st.tuples(*[none_or_some] * stages)),
        rank_factor=draw(st.tuples(*[st.integers(1, 3).map(float)] * ranks)),
        latency_s=draw(none_or_some),
    )
    held = [
        [
            s
            for line in (placement.down, placement.up or ())
            for s, on in enumerate(line)
            if on == rank
        ]
        for rank in range(ranks)
    ]
    caps = tuple(
        sum(kept[s] for s in own) + max(more[s] for s in own) + draw(st.integers(0, 12))
        for own in held
    )
    full = tuple(a + b for a, b in zip(kept, more, strict=True))
    count = draw(st.integers(2, 7))
    down = count if placement.up is None else draw(st.integers(1, count - 1))
    return CodedProblem(
        placement,
        directions=(DOWN,) * down + (UP,) * (count - down),
        costs=costs,
        memory=Memory(kept=kept, full=full, caps=caps),
    )


@settings(max_examples=60, deadline=None)
@given(problem=problems(), overlap=st.booleans(), seed=st.integers(0, 9))
def test_a_rebuilt_order_is_right_within_memory_and_no_slower(
    problem: CodedProblem, overlap: bool, seed: int
) -> None:
    start = problem.encode(_listed(problem))
    step_end = StepEnd(problem, overlap=overlap)
    found = rebuild(
        problem,
        start,
        effort=6 * ACTIONS_PER_ROUND * problem.num_actions,
        seed=seed,
        step_end=step_end,
    )
    verify(_schedule(problem, found), memory=problem.memory)
    before, after = (problem.ends(rows) for rows in (start, found))
    assert before is not None
    assert after is not None
    assert step_end.seconds(found, after) <= step_end.seconds(start, before)


@pytest.mark.parametrize(("ranks", "per_rank", "microbatches"), [(4, 4, 8), (8, 4, 16)])
def test_the_best_order_of_rules_is_rebuilt_within_one_percent_of_the_bound(
    ranks: int, per_rank: int, microbatches: int
) -> None:
    placement = place(PlacementKind.LINE, num_ranks=ranks, stages_per_rank=per_rank)
    costs = CostTable.uniform(
        placement.num_stages, forward_s=20.0, input_s=22.0, weight_s=16.0
    )  # measured F, I, W of a transformer layer, in milliseconds
    memory = Memory.counted(placement, cap=ranks * per_rank)  # as 1F1B holds
    directions = (DOWN,) * microbatches
    problem = CodedProblem(placement, directions=directions, costs=costs, memory=memory)
    bound_s = lower_bound_s(placement, directions=directions, costs=costs, memory=memory)
    (start,) = search_rules(
        problem, effort=50 * problem.num_actions, seed=0, bound_s=bound_s, keep=1
    )
    assert start.makespan_s > 1.015 * bound_s
    effort = 40 * ACTIONS_PER_ROUND * problem.num_actions
    ends = problem.ends(rebuild(problem, start.rows, effort=effort, seed=0))
    assert ends is not None
    assert bound_s <= max(ends) <= 1.01 * bound_s


def test_the_same_seed_gives_the_same_order_and_a_good_enough_one_stays() -> None:
    placement = place(PlacementKind.MIRROR, num_ranks=4)
    costs = CostTable.uniform(4, forward_s=2.0, input_s=2.0, weight_s=1.0)
    problem = CodedProblem(
        placement,
        directions=(DOWN,) * 4 + (UP,) * 4,
        costs=costs,
        memory=Memory.counted(placement, cap=5),
    )
    start = problem.encode(_listed(problem))
    effort = 20 * ACTIONS_PER_ROUND * problem.num_actions
    first, second = (rebuild(problem, start, effort=effort, seed=3) for _ in range(2))
    assert first == second
    assert first != start
    assert rebuild(problem, start, effort=effort, seed=3, target_s=1e9) == start


def _listed(problem: CodedProblem) -> Schedule:
    """A plain order of the list scheduler: F before everything else."""
    costs = problem.costs
    order = list_schedule(
        problem.placement,
        directions=problem.directions,
        rules=ListRules(
            duration=lambda stage, op, rank: costs.duration_s(stage, op=op),
            cap=lambda stage, direction: problem.count,
            split=True,
            memory=problem.memory,
            forward_first=True,
        ),
    )
    return Schedule(
        name="listed",
        placement=problem.placement,
        directions=problem.directions,
        actions=order,
    )


def _schedule(problem: CodedProblem, rows: list[list[int]]) -> Schedule:
    return Schedule(
        name="rebuilt",
        placement=problem.placement,
        directions=problem.directions,
        actions=fuse_first_stage(problem.decode(rows)),
    )
