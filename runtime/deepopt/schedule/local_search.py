"""Improve an order step by step: swap neighbours on its critical path.

A small tabu search on integer-coded orders, deterministic by its seed and bounded by its effort.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deepopt.schedule.coding import CodedProblem, Rows

_MOST_MOVES = 16  # swaps tried per step; more of them are drawn at random
_SHORTEST_TABU = 8
_LONGEST_TABU = 16
_SLACK = 1e-9  # of a time: what float sums in another order may differ by


def improve(
    problem: CodedProblem, rows: Rows, *, effort: int, seed: int, target_s: float = 0.0
) -> Rows:
    """A better order, or the same: swaps of neighbours along the critical path.

    Args:
        problem: what the rows order.
        rows: a right order within the memory.
        effort: actions to evaluate, over all tries.
        seed: of the random choices.
        target_s: an order that ends by then is good enough: stop.
    """
    chance = random.Random(seed)
    current = [list(row) for row in rows]
    ends = problem.ends(current)
    assert ends is not None, "local search starts from an order that runs"
    best, best_rows = max(ends), [list(row) for row in current]
    enough = target_s * (1 + _SLACK)
    tabu: dict[tuple[int, int], int] = {}
    tries = effort // max(1, problem.num_actions)
    step = 0
    while tries > 0 and best > enough:
        step += 1
        moves = _critical_swaps(problem, current, ends)
        if len(moves) > _MOST_MOVES:
            moves = chance.sample(moves, _MOST_MOVES)
        chosen = None
        for rank, index in moves:
            tries -= 1
            row = current[rank]
            pair = (row[index], row[index + 1])
            swapped = [*row[:index], pair[1], pair[0], *row[index + 2 :]]
            if not problem.fits(swapped, rank=rank):
                continue
            current[rank] = swapped
            new_ends = problem.ends(current)
            current[rank] = row
            if new_ends is None:
                continue
            makespan = max(new_ends)
            if tabu.get(pair, 0) > step and makespan >= best:
                continue
            finish = sum(new_ends[own[-1]] for own in current if own)
            key = (makespan, finish, chance.random())
            if chosen is None or key < chosen[0]:
                chosen = (key, rank, swapped, new_ends, pair)
        if chosen is None:
            kicked = _kick(problem, current, chance)
            tries -= 1
            if kicked is None:
                continue
            ends = kicked
        else:
            (makespan, _, _), rank, swapped, ends, pair = chosen
            current[rank] = swapped
            tabu[pair[1], pair[0]] = step + chance.randint(_SHORTEST_TABU, _LONGEST_TABU)
            if makespan < best:
                best, best_rows = makespan, [list(row) for row in current]
    return best_rows


def _critical_swaps(
    problem: CodedProblem, rows: Rows, ends: Sequence[float]
) -> list[tuple[int, int]]:
    """(rank, index) of neighbours on one longest path that may change places."""
    position = {code: index for row in rows for index, code in enumerate(row)}
    code = max((row[-1] for row in rows if row), key=lambda last: ends[last])
    moves = []
    while True:
        rank, index = problem.rank[code], position[code]
        start = ends[code] - problem.duration[code]
        before = rows[rank][index - 1] if index else -1
        maker = problem.needs[code]
        slack = _SLACK * (1 + start)
        tight = before >= 0 and ends[before] >= start - slack
        if tight and problem.may_swap(before, second=code):
            moves.append((rank, index - 1))
        if maker >= 0 and ends[maker] + problem.hop[code] >= start - slack:
            code = maker
        elif tight:
            code = before
        else:
            return moves


def _kick(problem: CodedProblem, rows: Rows, chance: random.Random) -> list[float] | None:
    """Swap some pair of neighbours, in place; None when the drawn pair cannot be swapped."""
    rank = chance.randrange(len(rows))
    row = rows[rank]
    if len(row) < 2:
        return None
    index = chance.randrange(len(row) - 1)
    if not problem.may_swap(row[index], second=row[index + 1]):
        return None
    swapped = [*row[:index], row[index + 1], row[index], *row[index + 2 :]]
    if not problem.fits(swapped, rank=rank):
        return None
    rows[rank] = swapped
    ends = problem.ends(rows)
    if ends is None:
        rows[rank] = row
    return ends
