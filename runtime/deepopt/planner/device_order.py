"""Which device takes which place in a pipeline, where devices differ in speed or memory. Pure.

A line of a few kinds of devices is solved exactly, over how many of each kind have been used; folded
placements are searched, and compared with what no order of the devices can beat. Rank 0 speaks for its
pipeline and sees its batches, so it keeps to a place that holds the first or the last layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from deepopt.planner.partition import Division

_SLACK = 1e-12
_MOST_STATES = 20_000  # counts of used devices: some seconds at 200 layers
_MOST_ORDERS = 5_040  # of kinds, tried one by one: 7 devices that all differ
_FEWEST_TRIALS, _MOST_TRIALS = 4, 400  # orders of a folded placement that are tried
_TRIAL_WORK = 32e6  # layers cubed x orders: some seconds on one core

Kind = tuple[float, float]
"""Factor and memory of a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Devices in their places.

    Args:
        order: the rank at each position.
        division: of the layers.
        exact: whether no other order and cut has a smaller load.
    """

    order: tuple[int, ...]
    division: Division
    exact: bool


def arrange_line(
    sums: Sequence[float],
    devices: Sequence[Kind],
    *,
    load: Callable[[Kind, int, int, int], float],
    crossing: Sequence[float] = (),
) -> Arrangement | None:
    """The least greatest load of a line over all orders of its devices.

    Args:
        sums: of the first n layers' work, for each n.
        devices: of each rank.
        load: load(device, position, first layer, end), at least work x factor.
        crossing: load of the route at a cut before each layer; empty for none.

    Returns:
        None where nothing fits, or the devices are of too many kinds to be sure of the best.
    """
    kinds = sorted(set(devices))
    counts = tuple(devices.count(kind) for kind in kinds)
    if math.prod(count + 1 for count in counts) > _MOST_STATES:
        return None
    speed = sum(1 / factor for factor, _ in devices)
    layers = [b - a for a, b in itertools.pairwise(sums)]
    bound = max(sums[-1] / speed, max(layers) * kinds[0][0])
    most = sums[-1] * kinds[-1][0]

    def best(cap: float, *, evenest: bool) -> tuple[_Found, int] | None:
        """With rank 0 first, or last, whichever is better."""
        ways = []
        for end in sorted({0, len(devices) - 1}):
            found = _over_counts(
                sums,
                kinds,
                counts,
                load,
                crossing,
                pinned=(end, devices[0]),
                cap=cap,
                evenest=evenest,
            )
            if found is not None:
                ways.append((found, end))
        return min(ways, key=lambda way: way[0][0], default=None)

    step = 0.01
    while True:
        cap = bound * (1 + step) if bound * (1 + step) <= most else float("inf")
        least = best(cap, evenest=False)
        if least is not None:
            break
        if cap == float("inf"):
            return None
        step *= 2
    even = best(least[0][0] * (1 + _SLACK), evenest=True)
    assert even is not None, "the least load that was reached can be reached"
    (_, edges, places), end = even
    return Arrangement(
        order=_ranks(places, devices=devices, first=end),
        division=Division(boundaries=edges, load=least[0][0]),
        exact=True,
    )


def arrange(
    devices: Sequence[Kind],
    *,
    num_layers: int,
    divide: Callable[[tuple[int, ...]], Division | None],
    ends: Sequence[int],
    bound: float,
) -> Arrangement | None:
    """The best order of devices that is found by trying orders: all, or swaps of two.

    Args:
        devices: of each rank.
        num_layers: says how long a trial takes.
        divide: the cut for the rank at each position.
        ends: positions that hold the first or the last layers.
        bound: no order has a smaller load.

    Returns:
        None where none fits.
    """
    num_ranks = len(devices)
    trials = min(_MOST_TRIALS, max(_FEWEST_TRIALS, int(_TRIAL_WORK // num_layers**3)))
    tried: set[tuple[Kind, ...]] = set()
    best: Arrangement | None = None

    def attempt(places: tuple[Kind, ...]) -> bool:
        """Whether devices of such kinds are better than the best so far."""
        nonlocal best
        end = next((end for end in ends if places[end] == devices[0]), None)
        if end is None or places in tried:
            return False
        tried.add(places)
        order = _ranks(places, devices=devices, first=end)
        division = divide(order)
        if division is None or (best is not None and division.load >= best.division.load):
            return False
        best = Arrangement(order=order, division=division, exact=False)
        return True

    def enough() -> bool:
        return best is not None and best.division.load <= bound * (1 + 1e-9)

    number = math.factorial(num_ranks)
    for kind in set(devices):
        number //= math.factorial(devices.count(kind))
    if number <= min(_MOST_ORDERS, trials):
        for places in _arrangements(devices):
            attempt(places)
            if enough():
                break
        return None if best is None else replace(best, exact=True)
    by_speed = tuple(sorted(devices))
    for places in (tuple(devices), by_speed, by_speed[::-1], _ends_first(by_speed)):
        attempt(places)
    moved = True
    while moved and not enough() and len(tried) < trials:
        moved = False
        start = tuple(devices) if best is None else tuple(devices[rank] for rank in best.order)
        for a, b in itertools.combinations(range(num_ranks), 2):
            if len(tried) >= trials or enough():
                break
            if start[a] != start[b]:
                swapped = list(start)
                swapped[a], swapped[b] = start[b], start[a]
                if attempt(tuple(swapped)):
                    moved = True
                    break
    return None if best is None else replace(best, exact=enough())


def _ends_first(order: Sequence[Kind]) -> tuple[Kind, ...]:
    """Neighbours in an order at the two ends: a mirror pairs them."""
    return (*order[::2], *order[1::2][::-1])


def _ranks(places: Sequence[Kind], *, devices: Sequence[Kind], first: int) -> tuple[int, ...]:
    """The rank at each position: rank 0 where it has to be, others of one kind in ascending order."""
    left = {
        kind: iter([rank for rank, device in enumerate(devices) if rank and device == kind])
        for kind in set(devices)
    }
    return tuple(
        0 if position == first else next(left[kind]) for position, kind in enumerate(places)
    )


def _arrangements(devices: Sequence[Kind]) -> Iterator[tuple[Kind, ...]]:
    """Every order of kinds, that of the ranks first."""
    yield tuple(devices)
    counts = {kind: devices.count(kind) for kind in sorted(set(devices))}

    def rest(places: tuple[Kind, ...]) -> Iterator[tuple[Kind, ...]]:
        if len(places) == len(devices):
            yield places
            return
        for kind in counts:
            if counts[kind]:
                counts[kind] -= 1
                yield from rest((*places, kind))
                counts[kind] += 1

    yield from rest(())


_Counts = tuple[int, ...]
_Found = tuple[float, tuple[int, ...], tuple[Kind, ...]]


def _over_counts(
    sums: Sequence[float],
    kinds: Sequence[Kind],
    counts: _Counts,
    load: Callable[[Kind, int, int, int], float],
    crossing: Sequence[float],
    *,
    pinned: tuple[int, Kind],
    cap: float,
    evenest: bool,
) -> _Found | None:
    """The best cut and order with no load above the cap, over used devices and layers so far."""
    num_layers, num_ranks = len(sums) - 1, sum(counts)
    speeds = [1 / factor for factor, _ in kinds]
    start_state = (0,) * len(kinds)
    best: dict[_Counts, dict[int, float]] = {start_state: {0: 0.0}}
    came: dict[tuple[_Counts, int], tuple[int, int]] = {}  # the end before, the kind
    for position in range(num_ranks):
        level: dict[_Counts, dict[int, float]] = {}
        last = num_layers - (num_ranks - 1 - position)
        for used, ends in best.items():
            for index, kind in enumerate(kinds):
                if used[index] == counts[index] or (
                    position == pinned[0] and kind != pinned[1]
                ):
                    continue
                now = (*used[:index], used[index] + 1, *used[index + 1 :])
                room = sum(
                    (whole - n) * speed
                    for whole, n, speed in zip(counts, now, speeds, strict=True)
                )
                needed = sums[-1] * (1 - _SLACK) - (cap * room if room else 0.0)
                row = level.setdefault(now, {})
                for start, before in ends.items():
                    route = crossing[start] if crossing and position else 0.0
                    if route > cap:
                        continue
                    for end in range(start + 1, last + 1):
                        cost = load(kind, position, start, end)
                        if cost > cap:
                            break
                        if sums[end] < needed:
                            continue
                        value = before + cost * cost if evenest else max(before, cost, route)
                        if value < row.get(end, float("inf")):
                            row[end] = value
                            came[now, end] = start, index
        best = level
    final = best.get(counts, {})
    if num_layers not in final:
        return None
    edges: list[int] = []
    places: list[Kind] = []
    state, end = counts, num_layers
    while state != start_state:
        start, index = came[state, end]
        edges.append(start)
        places.append(kinds[index])
        state = (*state[:index], state[index] - 1, *state[index + 1 :])
        end = start
    return final[num_layers], tuple(reversed(edges)), tuple(reversed(places))
