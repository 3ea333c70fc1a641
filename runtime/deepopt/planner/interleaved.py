"""Cuts for ranks that hold several stages of a line: rank r has stages r, r + p, r + 2p, ... Pure.

Which stages a rank holds together is given, so edges are moved until no single move helps: no claim to the
optimum, but the bound says how far it can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from deepopt.planner.partition import Division

RanksLoad = Callable[[int, tuple[tuple[int, int], ...]], float]
"""Load of (rank, its ranges of layers); infinite where they do not fit."""


def divide_interleaved(
    start: Sequence[int], *, num_layers: int, num_ranks: int, load: RanksLoad
) -> Division:
    """Move edges from a first cut while the greatest load, then the sum of squares, shrinks.

    Args:
        start: index of the first layer of each stage.
        num_layers: of the chain.
        num_ranks: stages are dealt to them in turns.
        load: of a rank.

    Returns:
        Its load is infinite where no cut was found that fits.
    """
    edges = list(start)

    def ranges(rank: int) -> tuple[tuple[int, int], ...]:
        ends = (*edges[1:], num_layers)
        return tuple((edges[s], ends[s]) for s in range(rank, len(edges), num_ranks))

    loads = [load(rank, ranges(rank)) for rank in range(num_ranks)]
    best = _worth(loads, edges, num_layers)
    moved = True
    while moved:
        moved = False
        for moves in _moves(len(edges)):
            for index, step in moves:
                edges[index] += step
            touched = {s % num_ranks for index, _ in moves for s in (index - 1, index)}
            ends = (*edges[1:], num_layers)
            if all(a < b for a, b in zip(edges, ends, strict=True)):
                changed = [
                    load(r, ranges(r)) if r in touched else loads[r] for r in range(num_ranks)
                ]
                new = _worth(changed, edges, num_layers)
                if new < best:
                    best, loads, moved = new, changed, True
                    continue
            for index, step in moves:
                edges[index] -= step
    return Division(boundaries=tuple(edges), load=max(loads))


def _worth(
    loads: Sequence[float], edges: Sequence[int], num_layers: int
) -> tuple[int, float, float, int]:
    """Smaller is better: ranks that do not fit, the greatest load, unequal ranks, unequal stages."""
    finite = [load for load in loads if load < float("inf")]
    sizes = [b - a for a, b in itertools.pairwise((*edges, num_layers))]
    return (
        len(loads) - len(finite),
        _rounded(max(finite, default=0.0)),
        _rounded(sum(load * load for load in finite)),
        sum(size * size for size in sizes),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")  # sums of floats in another order differ below


def _moves(num_stages: int) -> list[tuple[tuple[int, int], ...]]:
    """One edge by a layer; a run of edges by a layer, which moves a layer between far stages."""
    inner = range(1, num_stages)
    single = [((index, step),) for index in inner for step in (-1, 1)]
    runs = [
        tuple((index, step) for index in range(first, last + 1))
        for first in inner
        for last in range(first + 1, min(num_stages, first + num_stages // 2))
        for step in (-1, 1)
    ]
    return single + runs
