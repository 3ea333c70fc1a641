"""The partition is the best there is: compared with trying every cut."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.planner.partition import partition, partition_folded

costs_of_layers = st.lists(
    st.one_of(st.integers(0, 9).map(float), st.floats(0.0, 1e15, allow_subnormal=False)),
    min_size=1,
    max_size=9,
)


def every_cut(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for inner in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield (0, *inner)


def stage_costs(costs: Sequence[float], boundaries: Sequence[int]) -> tuple[float, ...]:
    """The cost of each stage, rounded as the partition rounds."""
    sums = [0.0, *itertools.accumulate(costs)]
    ends = (*boundaries[1:], len(costs))
    return tuple(sums[end] - sums[start] for start, end in zip(boundaries, ends, strict=True))


def folded_load(stages: Sequence[float], *, factors: Sequence[float] = ()) -> float:
    """The greatest cost of a pair of stages; the middle one of an odd number counts twice."""
    pairs = [a + b for a, b in zip(stages, reversed(stages), strict=True)]
    return max(map(operator.mul, factors or itertools.repeat(1.0), pairs))


@settings(max_examples=150, deadline=None)
@given(costs_of_layers, st.data())
def test_no_cut_has_a_cheaper_costliest_stage(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    boundaries = partition(costs, num_stages)
    best = min(max(stage_costs(costs, cut)) for cut in every_cut(len(costs), num_stages))
    assert boundaries in set(every_cut(len(costs), num_stages))
    assert max(stage_costs(costs, boundaries)) <= best + 1e-9 * sum(costs)


@settings(max_examples=150, deadline=None)
@given(costs_of_layers, st.data())
def test_no_cut_has_a_cheaper_costliest_pair_of_stages(
    costs: list[float], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    boundaries = partition_folded(costs, num_stages)
    cuts = list(every_cut(len(costs), num_stages))
    best = min(folded_load(stage_costs(costs, cut)) for cut in cuts)
    assert boundaries in set(cuts)
    assert folded_load(stage_costs(costs, boundaries)) <= best + 1e-9 * sum(costs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_among_equal_loads_the_evenest_stages_win(
    costs: list[int], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    cuts = [stage_costs(costs, cut) for cut in every_cut(len(costs), num_stages)]
    line = stage_costs(costs, partition(costs, num_stages))
    least = min(map(max, cuts))
    assert sum(c * c for c in line) == min(
        sum(c * c for c in cut) for cut in cuts if max(cut) == least
    )
    folded = stage_costs(costs, partition_folded(costs, num_stages))
    least = min(map(folded_load, cuts))
    assert folded_load(folded) == least
    assert sum(c * c for c in folded) == min(
        sum(c * c for c in cut) for cut in cuts if folded_load(cut) == least
    )


def test_equal_layers_form_equal_stages() -> None:
    assert partition([1.0] * 8, 4) == (0, 2, 4, 6)
    assert partition_folded([1.0] * 8, 4) == (0, 2, 4, 6)
    assert partition_folded([1.0] * 6, 3) == (0, 2, 4)


def test_a_heavy_last_layer_stands_alone() -> None:
    assert partition([1, 1, 1, 1, 4], 2) == (0, 4)


def test_the_folded_load_pairs_the_first_stage_with_the_last() -> None:
    # Alone, the heavy layer would bound a line; folded, its partner is made light.
    assert partition_folded([1, 1, 1, 1, 1, 3], 4) == (0, 1, 3, 5)


def test_layers_without_cost_still_fill_every_stage() -> None:
    assert partition([0.0] * 3, 3) == (0, 1, 2)
    assert partition_folded([0.0] * 3, 3) == (0, 1, 2)


def test_two_hundred_layers_on_sixty_four_stages_take_little_time() -> None:
    costs = [1.0 + (7 * layer % 5) / 10 for layer in range(200)]
    assert len(partition(costs, 64)) == len(partition_folded(costs, 64)) == 64


@pytest.mark.parametrize("cut", [partition, partition_folded])
@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused(
    cut: Callable[[list[float], int], tuple[int, ...]], num_stages: int
) -> None:
    with pytest.raises(PlanError, match=f"3 layers cannot form {num_stages} stages"):
        cut([1.0, 1.0, 1.0], num_stages)


def test_a_cheap_layer_is_left_for_a_stage_that_needs_one() -> None:
    """Taking as many layers behind as fit would leave the inner pair only a dear one."""
    costs = [1.0, 3.0, 0.0, 2.0, 0.0, 2.0, 0.0]
    stages = stage_costs(costs, partition_folded(costs, 5))
    assert (folded_load(stages), max(stages)) == (4.0, 3.0)


factors_of_devices = st.sampled_from([1.0, 1.3, 1.6, 2.5])


@settings(max_examples=150, deadline=None)
@given(costs_of_layers, st.data())
def test_no_cut_is_better_for_devices_of_unequal_speed(
    costs: list[float], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    factors = data.draw(st.lists(factors_of_devices, min_size=num_stages, max_size=num_stages))

    def load(cut: tuple[int, ...]) -> float:
        stages = stage_costs(costs, cut)
        return max(f * cost for f, cost in zip(factors, stages, strict=True))

    best = min(map(load, every_cut(len(costs), num_stages)))
    assert load(partition(costs, num_stages, factors=factors)) <= best + 1e-9 * sum(costs)


@settings(max_examples=150, deadline=None)
@given(costs_of_layers, st.data())
def test_no_folded_cut_is_better_for_devices_of_unequal_speed(
    costs: list[float], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    num_pairs = -(-num_stages // 2)
    factors = data.draw(st.lists(factors_of_devices, min_size=num_pairs, max_size=num_pairs))

    def load(cut: tuple[int, ...]) -> float:
        return folded_load(stage_costs(costs, cut), factors=factors)

    best = min(map(load, every_cut(len(costs), num_stages)))
    found = load(partition_folded(costs, num_stages, factors=factors))
    assert found <= best + 1e-9 * sum(costs)


def test_factors_of_other_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="not 2 positive factors"):
        partition([1.0, 2.0, 3.0], 2, factors=(1.0,))
