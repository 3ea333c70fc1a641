"""The end of a step in coded orders: the simulator's figures, and what searches make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.schedule import rule_search
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.coding import CodedProblem
from deepopt.schedule.ir import Direction, Placement, PlacementKind, place
from deepopt.schedule.memory import Memory
from deepopt.schedule.search import search
from deepopt.schedule.simulate import CostTable, simulate
from deepopt.schedule.step_end import StepEnd

MIRROR = place(PlacementKind.MIRROR, num_ranks=4)


def both_ways(microbatches: int) -> tuple[Direction, ...]:
    down = (microbatches + 1) // 2
    return (Direction.DOWN,) * down + (Direction.UP,) * (microbatches - down)


def coded(placement: Placement, ways: Sequence[Direction], costs: CostTable) -> CodedProblem:
    return CodedProblem(
        placement,
        directions=ways,
        costs=costs,
        memory=Memory.counted(placement, cap=None),
    )


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 6), st.booleans())
def test_step_times_of_coded_orders_are_the_simulators(
    data: st.DataObject, microbatches: int, overlap: bool
) -> None:
    kind = data.draw(st.sampled_from(list(PlacementKind)))
    placement = place(kind, num_ranks=data.draw(st.integers(1, 4)))
    ways = (Direction.DOWN,) * microbatches if placement.up is None else both_ways(microbatches)
    times = st.tuples(*[st.integers(0, 9).map(float)] * placement.num_stages)
    costs = CostTable(
        forward_s=data.draw(times),
        input_s=data.draw(times),
        weight_s=data.draw(times),
        reduce_s=data.draw(times),
        update_s=data.draw(times),
        rank_factor=tuple(float(1 + rank % 2) for rank in range(placement.num_ranks)),
        latency_s=1.0,
    )
    name = data.draw(
        st.sampled_from([n for n in BUILDERS if misfit(n, placement=placement) is None])
    )
    schedule = build(name, placement=placement, directions=ways)
    problem = coded(placement, ways, costs)
    rows = problem.encode(schedule)
    ends = problem.ends(rows)
    assert ends is not None
    end = StepEnd(problem, overlap=overlap)
    split = replace(schedule, actions=problem.decode(rows))  # coded orders have no B
    timeline = simulate(split, costs)
    told = timeline.steady_s if overlap else timeline.makespan_s
    assert end.seconds(rows, ends) == pytest.approx(told)
    assert end.least_s == pytest.approx(max(timeline.busy_s))


def test_a_step_is_decided_by_the_gradients_that_an_exchange_waits_for() -> None:
    """Rank 1 ends first, and its update waits for the other copy of its stage on rank 0."""
    placement = place(PlacementKind.MIRROR, num_ranks=2)
    costs = CostTable(
        forward_s=(1.0, 1.0),
        input_s=(1.0, 1.0),
        weight_s=(1.0, 1.0),
        reduce_s=(50.0, 0.0),
        update_s=(1.0, 1.0),
    )
    ways = both_ways(2)
    problem = coded(placement, ways, costs)
    rows = problem.encode(build("bi_stream", placement=placement, directions=ways))
    ends = problem.ends(rows)
    assert ends is not None
    deciding = StepEnd(problem).critical(rows, ends)
    assert deciding in (problem.weight_code(0, 0), problem.weight_code(0, 1))
    tails = StepEnd(problem).tails(rows, ends)
    assert ends[deciding] + tails.of_code[deciding] == StepEnd(problem).seconds(rows, ends)


def test_overlapping_steps_of_a_mirror_hardly_wait() -> None:
    """Each rank has 472 to compute and 10 to update; nothing but the ends of its stages' exchange
    can make it wait for long."""
    costs = CostTable(
        forward_s=(20.0,) * 4,
        input_s=(22.0,) * 4,
        weight_s=(16.0,) * 4,
        reduce_s=(5.0,) * 4,
        update_s=(5.0,) * 4,
        latency_s=1.0,
    )
    found = search(
        MIRROR,
        directions=both_ways(8),
        costs=costs,
        memory_cap=5,
        overlap=True,
        effort=100_000,
    )
    assert found.lower_bound_s == 8 * (20 + 22 + 16) + 2 * 5
    assert found.gap < 0.015
    alone = search(MIRROR, directions=both_ways(8), costs=costs, memory_cap=5, effort=100_000)
    assert simulate(alone.schedule, costs).steady_s > found.makespan_s


@pytest.mark.parametrize("overlap", [False, True])
def test_a_search_evaluates_no_more_actions_than_its_effort(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    """Whatever the effort, but for the builders' orders and a look at each start and result. Six are
    evaluated in the time in which one is scheduled."""
    done = {"actions": 0.0}

    def counting(work: Callable[..., Any], *, weight: float = 1 / 6) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            done["actions"] += weight * num_actions
            return work(*arguments, **options)

        return counted

    ways = both_ways(8)
    costs = replace(
        CostTable.uniform(4, forward_s=20, input_s=22, weight_s=16, latency_s=1),
        reduce_s=(5.0,) * 4,
        update_s=(5.0,) * 4,
    )
    num_actions = coded(MIRROR, ways, costs).num_actions
    monkeypatch.setattr(CodedProblem, "ends", counting(CodedProblem.ends))
    monkeypatch.setattr(CodedProblem, "tails", counting(CodedProblem.tails))
    monkeypatch.setattr(rule_search, "list_codes", counting(rule_search.list_codes, weight=1))
    for effort in (0, 100, 60_000):
        done["actions"] = 0
        search(
            MIRROR,
            directions=ways,
            costs=costs,
            memory_cap=5,
            effort=effort,
            overlap=overlap,
        )
        beside = len(BUILDERS) + 12  # builders; ends of the starts, their orders and results
        assert done["actions"] <= effort + beside * num_actions
        assert done["actions"] >= effort // 4  # and it does use it
