"""Cut a chain of layers into stages so that the busiest rank has as little to do as possible.

Exact for the objective it states, in pure arithmetic. It knows loads only: what a stage costs a rank, and
whether it fits there, is decided by `stage_load`; which schedule runs on the stages by `schedule`.

All solvers are dynamic programs under a cap on the load that starts at a lower bound and grows until a
cut is found; what cannot be part of a cut below the cap is never looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError

_SLACK = 1e-12  # two loads closer than this are one: float sums differ by as much
_FIRST_STEP = 0.01  # of the bound: how far above it a cut is looked for first
_INFINITE = float("inf")

LineLoad = Callable[[int, int, int], float]
"""Load of (position, first layer, end): grows with the layers; infinite where they do not fit."""
FoldedLoad = Callable[[int, int, int, int, int], float]
"""Load of (pair, first layer, end, first layer, end): the same for two ranges of one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Where a chain is cut.

    Args:
        boundaries: index of the first layer of each stage.
        load: of the busiest position.
    """

    boundaries: tuple[int, ...]
    load: float


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
    sums = sums_of(costs, num_stages)
    scale = _factors(factors, num_stages)
    found = divide_line(
        sums, scale, load=lambda stage, a, b: (sums[b] - sums[a]) * scale[stage]
    )
    assert found is not None, "without a memory, every cut fits"
    return found.boundaries


def partition_folded(
    costs: Sequence[float], num_stages: int, *, factors: Sequence[float] = ()
) -> tuple[int, ...]:
    """Contiguous non-empty stages for ranks that serve stage s and stage num_stages - 1 - s.

    That is mirror placement (half of the micro-batches go through each of the two, so a rank's
    load is half of the pair's cost) and V placement (all go through both). The greatest pair
    cost is the smallest possible, with the middle stage of an odd number counted twice; among
    the best, the sum of the squared stage costs.

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
    sums = sums_of(costs, num_stages)
    scale = _factors(factors, -(-num_stages // 2))
    found = divide_folded(
        sums,
        scale,
        num_stages=num_stages,
        load=lambda pair, a, b, c, d: (sums[b] - sums[a] + sums[d] - sums[c]) * scale[pair],
    )
    assert found is not None, "without a memory, every cut fits"
    return found.boundaries


def divide_line(
    sums: Sequence[float],
    factors: Sequence[float],
    *,
    load: LineLoad,
    crossing: Sequence[float] = (),
    stretch: float = 1.0,
) -> Division | None:
    """The least greatest load of a line, then the least sum of squared loads.

    Args:
        sums: of the first n layers' work, for each n.
        factors: least load of a unit of work at each position.
        load: at least work x factor.
        crossing: load of the route at a cut before each layer; empty for none.
        stretch: at least 1: the sum of squares is sought among loads up to so many times the least.

    Returns:
        None where no cut fits.
    """
    least = _lowest(
        lambda cap: _line(sums, factors, load, crossing, cap=cap, evenest=False),
        bound=line_bound(sums, factors),
        most=sums[-1] * max(factors),
    )
    if least is None:
        return None
    cap = max(least[0] * (1 + _SLACK), least[0] * stretch)
    found = _line(sums, factors, load, crossing, cap=cap, evenest=True)
    assert found is not None, "the least load that was reached can be reached"
    edges = found[1]
    ends = (*edges[1:], len(sums) - 1)
    loads = [load(i, a, b) for i, (a, b) in enumerate(zip(edges, ends, strict=True))]
    routes = [crossing[a] for a in edges[1:]] if crossing else []
    return Division(boundaries=edges, load=max(*loads, *routes, 0.0))


def divide_folded(
    sums: Sequence[float],
    factors: Sequence[float],
    *,
    num_stages: int,
    load: FoldedLoad,
    crossing: Sequence[float] = (),
    turns: bool = True,
    stretch: float = 1.0,
) -> Division | None:
    """As `divide_line`, for pairs of stages s and num_stages - 1 - s, from the outermost inwards.

    Args:
        sums: of the first n layers' work, for each n.
        factors: least load of a unit of work of each pair.
        num_stages: with an odd number, the middle stage is paired with itself.
        load: at least work x factor.
        crossing: load of the route at a cut before each layer; empty for none.
        turns: whether the two middle stages are on one rank (V), so that no route lies between them.
        stretch: as for `divide_line`.

    Returns:
        None where no cut fits.
    """
    least = _lowest(
        lambda cap: _folded(
            sums, factors, num_stages, load, crossing, turns, cap=cap, evenest=False
        ),
        bound=folded_bound(sums, factors, num_stages=num_stages),
        most=2 * sums[-1] * max(factors),
    )
    if least is None:
        return None
    cap = max(least[0] * (1 + _SLACK), least[0] * stretch)
    found = _folded(sums, factors, num_stages, load, crossing, turns, cap=cap, evenest=True)
    assert found is not None, "the least load that was reached can be reached"
    edges = found[1]
    ends = (*edges[1:], len(sums) - 1)
    loads = [
        load(i, edges[i], ends[i], edges[-1 - i], ends[-1 - i]) for i in range(len(factors))
    ]
    middle = num_stages // 2 if turns and num_stages % 2 == 0 else 0
    routes = (
        [crossing[a] for i, a in enumerate(edges) if i not in (0, middle)] if crossing else []
    )
    return Division(boundaries=edges, load=max(*loads, *routes, 0.0))


def line_bound(sums: Sequence[float], factors: Sequence[float]) -> float:
    """No cut of a line has a smaller greatest load: all positions full, or one layer alone.

    Args:
        sums: of the first n layers' work, for each n.
        factors: least load of a unit of work at each position.
    """
    speed = sum(1 / factor for factor in factors)
    layers = [b - a for a, b in itertools.pairwise(sums)]
    return max(sums[-1] / speed, max(layers) * min(factors))


def folded_bound(sums: Sequence[float], factors: Sequence[float], *, num_stages: int) -> float:
    """As `line_bound`, for pairs.

    Args:
        sums: of the first n layers' work, for each n.
        factors: least load of a unit of work of each pair.
        num_stages: with an odd number, the middle stage counts twice.
    """
    speed = sum(1 / factor for factor in factors)
    if num_stages % 2:
        speed -= 1 / factors[-1] / 2
    layers = [b - a for a, b in itertools.pairwise(sums)]
    return max(sums[-1] / speed, max(layers) * min(factors))


def sums_of(costs: Sequence[float], num_stages: int) -> list[float]:
    """The work of the first n layers, for each n.

    Args:
        costs: cost of each layer, each at least 0.
        num_stages: that the layers have to form.

    Raises:
        PlanError: more stages than layers.
    """
    if not 1 <= num_stages <= len(costs):
        raise PlanError(
            f"{len(costs)} layers cannot form {num_stages} stages",
            remedy=f"choose between 1 and {len(costs)} stages: fewer workers or a deeper model",
        )
    assert all(cost >= 0 for cost in costs), f"a layer cost is negative: {list(costs)}"
    return [0.0, *itertools.accumulate(costs)]


def _factors(factors: Sequence[float], count: int) -> Sequence[float]:
    if not factors:
        return (1.0,) * count
    if len(factors) != count or not all(factor > 0 for factor in factors):
        raise PlanError(
            f"{list(factors)} are not {count} positive factors of devices",
            remedy="give one factor for each rank, 1 for the reference device",
        )
    return factors


_Cut = tuple[float, tuple[int, ...]]  # its greatest load, or its sum of squares, and its edges


def _lowest(cut: Callable[[float], _Cut | None], *, bound: float, most: float) -> _Cut | None:
    """The best cut under the first cap that admits one; None where none does."""
    step = _FIRST_STEP
    while True:
        cap = min(bound * (1 + step), most * (1 + _SLACK))
        found = cut(cap)
        if found is not None:
            return found
        if bound * (1 + step) > most:
            return cut(_INFINITE)  # loads may exceed work x factor, by what is run again
        step *= 2


def _line(
    sums: Sequence[float],
    factors: Sequence[float],
    load: LineLoad,
    crossing: Sequence[float],
    *,
    cap: float,
    evenest: bool,
) -> _Cut | None:
    """The best cut with no load above the cap."""
    num_layers, num_stages = len(sums) - 1, len(factors)
    needed = _needed(sums[-1], [cap / factor for factor in factors])
    best = [0.0] + [_INFINITE] * num_layers  # of the first layers in the stages so far
    choices: list[list[int]] = []
    for stage in range(num_stages):
        new = [_INFINITE] * (num_layers + 1)
        chosen = [0] * (num_layers + 1)
        last = num_layers - (num_stages - 1 - stage)
        for end in range(last, stage, -1):
            if sums[end] < needed[stage + 1]:
                break
            for start in range(end - 1, stage - 1, -1):
                cost = load(stage, start, end)
                if cost > cap:
                    break
                before = best[start]
                if before == _INFINITE or (crossing and stage and crossing[start] > cap):
                    continue
                if evenest:
                    value = before + cost * cost
                else:
                    value = max(before, cost, crossing[start] if crossing and stage else 0.0)
                if value < new[end]:
                    new[end], chosen[end] = value, start
        best = new
        choices.append(chosen)
    if best[num_layers] == _INFINITE:
        return None
    edges = [num_layers]
    for chosen in reversed(choices):
        edges.append(chosen[edges[-1]])
    return best[num_layers], tuple(reversed(edges[1:]))


def _folded(
    sums: Sequence[float],
    factors: Sequence[float],
    num_stages: int,
    load: FoldedLoad,
    crossing: Sequence[float],
    turns: bool,
    *,
    cap: float,
    evenest: bool,
) -> _Cut | None:
    """The best cut with no pair above the cap: from both ends inwards, over (front, behind)."""
    num_layers, num_pairs = len(sums) - 1, num_stages // 2
    rooms = [cap / factor for factor in factors]
    if num_stages % 2:
        rooms[-1] /= 2
    needed = _needed(sums[-1], rooms)
    State = tuple[int, int]
    best: dict[State, float] = {(0, num_layers): 0.0}
    steps: list[dict[State, State]] = []
    for pair in range(num_pairs):
        inner = num_stages - 2 * (pair + 1)
        new: dict[State, float] = {}
        came: dict[State, State] = {}
        for (front, behind), before in best.items():
            for end, start, cost in _pairs(
                sums, load, pair, front, behind, inner=inner, cap=cap, needed=needed[pair + 1]
            ):
                # The cut before `end` is the next pair's, or in the middle the same as this one.
                route = max(
                    crossing[front] if crossing and pair else 0.0,
                    crossing[start] if crossing and (inner or not turns) else 0.0,
                )
                if route > cap:
                    continue
                if evenest:
                    one, other = sums[end] - sums[front], sums[behind] - sums[start]
                    value = before + factors[pair] ** 2 * (one * one + other * other)
                else:
                    value = max(before, cost, route)
                if value < new.get((end, start), _INFINITE):
                    new[end, start], came[end, start] = value, (front, behind)
        best = new
        steps.append(came)
    final: tuple[float, State] | None = None
    for (front, behind), before in best.items():
        if num_stages % 2 == 0:
            if front == behind and (final is None or before < final[0]):
                final = before, (front, behind)
            continue
        if front >= behind:
            continue
        cost = load(num_pairs, front, behind, front, behind)
        route = crossing[front] if crossing and num_pairs else 0.0
        if max(cost, route) > cap:
            continue
        alone = (sums[behind] - sums[front]) * factors[-1]
        value = before + alone * alone if evenest else max(before, cost, route)
        if final is None or value < final[0]:
            final = value, (front, behind)
    if final is None:
        return None
    value, state = final
    fronts, behinds = [], []
    middle = [state[0]] if num_stages % 2 else []
    for came in reversed(steps):
        behinds.append(state[1])
        state = came[state]
        fronts.append(state[0])
    return value, (*reversed(fronts), *middle, *behinds)


def _pairs(
    sums: Sequence[float],
    load: FoldedLoad,
    pair: int,
    front: int,
    behind: int,
    *,
    inner: int,
    cap: float,
    needed: float,
) -> Iterator[tuple[int, int, float]]:
    """Every (end, start) of a pair that takes [front, end) and [start, behind), with its load."""
    taken = sums[front] + sums[-1] - sums[behind]
    for end in range(front + 1, behind - inner):
        if load(pair, front, end, behind - 1, behind) > cap:
            return
        for start in range(behind - 1, end + inner - 1, -1):
            cost = load(pair, front, end, start, behind)
            if cost > cap:
                break
            so_far = taken + sums[end] - sums[front] + sums[behind] - sums[start]
            if so_far >= needed and (inner or start == end):
                yield end, start, cost


def _needed(total: float, rooms: Sequence[float]) -> list[float]:
    """Work that has to be taken before each position, so that the rest has room."""
    left = [0.0, *itertools.accumulate(reversed(rooms))]
    return [total * (1 - _SLACK) - room * (1 + _SLACK) for room in reversed(left)]
