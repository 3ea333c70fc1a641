"""Cut a chain of layers into stages so that the busiest rank has as little to do as possible.

Exact for the objective it states, in pure arithmetic. It knows costs only: what a layer costs
is decided by `decide`, and which schedule runs on the stages by `schedule`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from operator import add, mul

from deepopt.errors import PlanError

_RELATIVE_STEP = 1e-12  # two loads closer than this are one: float sums differ by as much


def partition(
    costs: Sequence[float], num_stages: int, *, factors: Sequence[float] = ()
) -> tuple[int, ...]:
    """Contiguous non-empty stages with the smallest possible cost of the costliest stage.

    Among the best, the one with the smallest sum of squares, so that the other stages are even
    too: they set the length of warm-up and cool-down.

    Args:
        costs: cost of each layer in chain order, each at least 0.
        num_stages: 1 to len(costs).
        factors: multiplies the cost of each stage, by the speed of its device; empty for 1.

    Returns:
        Index of the first layer of each stage.

    Raises:
        PlanError: more stages than layers.
    """
    sums = _sums(costs, num_stages)
    scale = _factors(factors, num_stages)
    cap = _least_cap(
        lambda cap: _line(sums, scale, cap),
        load=lambda edges: max(map(mul, scale, _stage_costs(sums, edges))),
        total=sums[-1] * max(scale),
    )
    return _evenest_line(sums, scale, cap)


def partition_folded(
    costs: Sequence[float], num_stages: int, *, factors: Sequence[float] = ()
) -> tuple[int, ...]:
    """Contiguous non-empty stages for ranks that serve stage s and stage num_stages - 1 - s.

    That is mirror placement (half of the micro-batches go through each of the two, so a rank's
    load is half of the pair's cost) and V placement (all go through both). The greatest pair
    cost is the smallest possible, with the middle stage of an odd number counted twice; among
    the best, the costliest single stage is the smallest possible. Exact in both up to a relative
    1e-12. What freedom is left goes into evening
    out the stages, layer by layer, without a claim to the optimum.

    Args:
        costs: cost of each layer in chain order, each at least 0.
        num_stages: 1 to len(costs).
        factors: multiplies the cost of each pair, from the outermost inwards, by the speed of the
            slowest device that serves it; empty for 1.

    Returns:
        Index of the first layer of each stage.

    Raises:
        PlanError: more stages than layers.
    """
    sums = _sums(costs, num_stages)
    scale = _factors(factors, -(-num_stages // 2))

    def caps(cap: float) -> list[float]:
        return [cap / factor for factor in scale]

    load_cap = _least_cap(
        lambda cap: _folded(sums, num_stages, pair_caps=caps(cap), stage_cap=sums[-1]),
        load=lambda edges: folded_load(_stage_costs(sums, edges), factors=scale),
        total=2 * sums[-1] * max(scale),
    )
    pair_caps = [cap * (1 + _RELATIVE_STEP) for cap in caps(load_cap)]
    stage_cap = _least_cap(
        lambda cap: _folded(sums, num_stages, pair_caps=pair_caps, stage_cap=cap),
        load=lambda edges: max(_stage_costs(sums, edges)),
        total=sums[-1],
    )
    edges = _folded(sums, num_stages, pair_caps=pair_caps, stage_cap=stage_cap)
    assert edges is not None, "the least caps that were reached can be reached again"
    return _even_out(sums, edges, pair_caps=pair_caps, stage_cap=stage_cap)


def stage_costs(costs: Sequence[float], boundaries: Sequence[int]) -> tuple[float, ...]:
    """The cost of each stage.

    Args:
        costs: cost of each layer.
        boundaries: index of the first layer of each stage.
    """
    return tuple(_stage_costs([0.0, *itertools.accumulate(costs)], boundaries))


def folded_load(stages: Sequence[float], *, factors: Sequence[float] = ()) -> float:
    """The greatest cost of a pair of stages s and num_stages - 1 - s.

    Args:
        stages: cost of each stage; the middle one of an odd number counts twice.
        factors: of each pair, from the outermost inwards; empty for 1.
    """
    scale = _factors(factors, -(-len(stages) // 2))
    pairs = [a + b for a, b in zip(stages, reversed(stages), strict=True)]
    load: float = max(map(mul, scale, pairs))
    return load


def _factors(factors: Sequence[float], count: int) -> Sequence[float]:
    if not factors:
        return (1.0,) * count
    if len(factors) != count or not all(factor > 0 for factor in factors):
        raise PlanError(
            f"{list(factors)} are not {count} positive factors of devices",
            remedy="give one factor for each rank, 1 for the reference device",
        )
    return factors


def _sums(costs: Sequence[float], num_stages: int) -> list[float]:
    if not 1 <= num_stages <= len(costs):
        raise PlanError(
            f"{len(costs)} layers cannot form {num_stages} stages",
            remedy=f"choose between 1 and {len(costs)} stages: fewer workers or a deeper model",
        )
    assert all(cost >= 0 for cost in costs), f"a layer cost is negative: {list(costs)}"
    return [0.0, *itertools.accumulate(costs)]


def _stage_costs(sums: Sequence[float], edges: Sequence[int]) -> list[float]:
    ends = (*edges[1:], len(sums) - 1)
    return [sums[end] - sums[start] for start, end in zip(edges, ends, strict=True)]


def _least_cap(
    cut: Callable[[float], tuple[int, ...] | None],
    *,
    load: Callable[[tuple[int, ...]], float],
    total: float,
) -> float:
    """The least load that any cut has: bisect, and jump to loads that were reached."""
    low, high = 0.0, total * (1 + _RELATIVE_STEP)
    while high - low > _RELATIVE_STEP * total:
        middle = (low + high) / 2
        edges = cut(middle)
        if edges is None:
            low = middle
        else:
            high = min(middle, load(edges))
    return high * (1 + _RELATIVE_STEP)  # so that the same sums, in another order, still fit


def _line(
    sums: Sequence[float], factors: Sequence[float], cap: float
) -> tuple[int, ...] | None:
    """Stages up to the cap of their device: by every layer at which each stage can end.

    With devices of one speed the longest stage would always do; a slow device after a fast one may
    have to be given less than the fast one leaves.
    """
    num_layers = len(sums) - 1
    ends: list[list[int]] = [[0]]  # ascending
    for stage, factor in enumerate(factors):
        last = num_layers - (len(factors) - 1 - stage)  # a layer for each stage to come
        reached: list[int] = []
        for start in ends[-1]:
            end = min(bisect.bisect_right(sums, sums[start] + cap / factor) - 1, last)
            first = max(start, reached[-1] if reached else 0) + 1
            reached.extend(range(first, end + 1))
        if not reached:
            return None
        ends.append(reached)
    if ends[-1][-1] != num_layers:
        return None
    edges = [num_layers]
    for stage in reversed(range(len(factors))):
        room = cap / factors[stage]
        edges.append(next(e for e in ends[stage] if sums[edges[-1]] <= sums[e] + room))
    return tuple(reversed(edges[1:]))


def _evenest_line(
    sums: Sequence[float], factors: Sequence[float], cap: float
) -> tuple[int, ...]:
    """The smallest sum of squared stage costs with no stage above the cap."""
    num_layers, num_stages = len(sums) - 1, len(factors)
    best = [0.0] + [float("inf")] * num_layers  # of the first layers in the stages so far
    choices: list[list[int]] = []
    for stage in range(num_stages):
        new = [float("inf")] * (num_layers + 1)
        chosen = [0] * (num_layers + 1)
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            for start in range(end - 1, stage - 1, -1):
                cost = (sums[end] - sums[start]) * factors[stage]
                if cost > cap:
                    break
                if best[start] + cost * cost < new[end]:
                    new[end] = best[start] + cost * cost
                    chosen[end] = start
        best = new
        choices.append(chosen)
    assert best[num_layers] < float("inf"), "the least cap that was reached can be reached"
    edges = [num_layers]
    for chosen in reversed(choices):
        edges.append(chosen[edges[-1]])
    return tuple(reversed(edges[1:]))


def _folded(
    sums: Sequence[float], num_stages: int, *, pair_caps: Sequence[float], stage_cap: float
) -> tuple[int, ...] | None:
    """Take pairs from both ends under the caps: depth first, the largest stages first.

    A state that failed is not tried again, and one whose rest cannot fit into the pairs to come
    is not entered, so both a loose and an impossible cap are decided early.
    """
    num_layers, num_pairs = len(sums) - 1, num_stages // 2
    odd = num_stages % 2 == 1
    failed: set[tuple[int, int, int]] = set()
    paired = [*pair_caps[:num_pairs], 0.0]
    room_from = list(itertools.accumulate(reversed(paired)))[::-1]  # of the pairs to come

    def search(pair: int, front: int, behind: int) -> tuple[int, ...] | None:
        rest = sums[behind] - sums[front]
        if pair == num_pairs:
            if odd:
                fits = front < behind and rest <= stage_cap and 2 * rest <= pair_caps[pair]
                return (front,) if fits else None
            return () if front == behind else None
        room = room_from[pair] + (min(stage_cap, pair_caps[-1] / 2) if odd else 0)
        if rest > room * (1 + _RELATIVE_STEP) or (pair, front, behind) in failed:
            return None
        later = num_stages - 2 * (pair + 1)
        pair_cap = pair_caps[pair]
        cap = min(stage_cap, pair_cap)
        last = min(bisect.bisect_right(sums, sums[front] + cap) - 1, behind - later - 1)
        for end in range(last, front, -1):
            room = min(stage_cap, pair_cap - (sums[end] - sums[front]))
            first = max(bisect.bisect_left(sums, sums[behind] - room), end + later)
            for start in range(first, behind):
                inner = search(pair + 1, end, start)
                if inner is not None:
                    return (front, *inner, start)
        failed.add((pair, front, behind))
        return None

    return search(0, 0, num_layers)


def _even_out(
    sums: Sequence[float],
    edges: tuple[int, ...],
    *,
    pair_caps: Sequence[float],
    stage_cap: float,
) -> tuple[int, ...]:
    """Move single edges by one layer as long as the squares shrink and the caps hold."""

    def squares(cut: Sequence[int]) -> float:
        return sum(cost * cost for cost in _stage_costs(sums, cut))

    best = list(edges)
    moved = True
    while moved:
        moved = False
        for index in range(1, len(best)):
            after = best[index + 1] if index + 1 < len(best) else len(sums) - 1
            for edge in (best[index] - 1, best[index] + 1):
                if not best[index - 1] < edge < after:
                    continue
                cut = [*best[:index], edge, *best[index + 1 :]]
                stages = _stage_costs(sums, cut)
                pairs = map(add, stages, reversed(stages))
                fits = max(stages) <= stage_cap and all(
                    pair <= cap for pair, cap in zip(pairs, pair_caps, strict=False)
                )
                if fits and squares(cut) < squares(best):
                    best, moved = cut, True
    return tuple(best)
