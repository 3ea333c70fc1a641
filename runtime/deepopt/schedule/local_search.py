"""Improve an order step by step: moves of actions on its critical path.

A small tabu search on integer-coded orders, deterministic by its seed and bounded by its effort. Each step
estimates every swap of neighbours on the critical path from what comes before and after it, evaluates the
best one, and a few drawn moves over longer distances; the best of those is taken, whether it improves or not.

Source: the estimate is that of E. Taillard, "Parallel taboo search techniques for the job shop scheduling
problem", ORSA Journal on Computing 6 (1994).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepopt.schedule.coding import CodedProblem, Rows
from deepopt.schedule.step_end import EndTails, StepEnd

_SHORTEST_TABU = 8
_LONGEST_TABU = 16
_SLACK = 1e-9  # of a time: what float sums in another order may differ by
_MOST_SWAPS = 6  # estimated swaps of which the first that fits the memory is evaluated
_LONG_MOVES = 3  # a step
_LONGEST_MOVE = 8  # places
_PATIENCE = 80  # steps without a better order, then on from the best one
_MOST_KICKS = 6  # drawn swaps, so that it does not go the same way again


class _Move(NamedTuple):
    """A changed row and what it makes of the order."""

    seconds: float
    chance: float  # decides between equal ones
    rank: int
    row: list[int]
    ends: list[float]
    tabu: tuple[int, int] | None  # neighbours that shall not change places back soon


def improve(
    problem: CodedProblem,
    rows: Rows,
    *,
    effort: int,
    seed: int,
    target_s: float = 0.0,
    step_end: StepEnd | None = None,
) -> Rows:
    """A better order, or the same.

    Args:
        problem: what the rows order.
        rows: a right order within the memory.
        effort: actions to evaluate, over all tries.
        seed: of the random choices.
        target_s: an order that takes no longer is good enough: stop.
        step_end: says how long a step takes; None: until the end of its last action.
    """
    chance = random.Random(seed)
    step_end = step_end or StepEnd(problem)
    current = [list(row) for row in rows]
    ends = problem.ends(current)
    assert ends is not None, "local search starts from an order that runs"
    best, best_rows = step_end.seconds(current, ends), [list(row) for row in current]
    enough = target_s * (1 + _SLACK)
    tabu: dict[tuple[int, int], int] = {}
    tries = effort // max(1, problem.num_actions)
    step = better_at = 0
    while tries > 0 and best > enough:
        step += 1
        if step - better_at > _PATIENCE:
            better_at = step
            tabu.clear()
            current = [list(row) for row in best_rows]
            kicks = chance.randint(1, _MOST_KICKS)
            tries -= kicks + 1
            for _ in range(kicks):
                _kick(problem, current, chance)
            ends = problem.ends(current)
            assert ends is not None, "kicks leave an order that runs"
        tries -= 2  # one for the tails, which cost as much as two evaluations with their sort
        neighbours = _critical_neighbours(problem, step_end, current, ends)
        forbidden = {pair for pair, until in tabu.items() if until > step}
        moves = [
            *_swap(
                *(problem, step_end, current, ends, neighbours, chance),
                forbidden=forbidden,
                best=best,
            ),
            *_long_moves(problem, step_end, current, neighbours, chance),
        ]
        tries -= len(moves)
        if not moves:
            kicked = _kick(problem, current, chance)
            tries -= 1
            ends = kicked or ends
            continue
        taken = min(moves, key=lambda move: move[:2])
        ends = taken.ends
        current[taken.rank] = taken.row
        if taken.tabu is not None:
            tabu[taken.tabu] = step + chance.randint(_SHORTEST_TABU, _LONGEST_TABU)
        if taken.seconds < best:
            best, best_rows, better_at = taken.seconds, [list(row) for row in current], step
    return best_rows


def _swap(
    problem: CodedProblem,
    step_end: StepEnd,
    rows: Rows,
    ends: Sequence[float],
    neighbours: Sequence[tuple[int, int]],
    chance: random.Random,
    *,
    forbidden: set[tuple[int, int]],
    best: float,
) -> Iterator[_Move]:
    """The swap of critical neighbours that looks best, if one fits."""
    last = step_end.tails(rows, ends)
    tails = problem.tails(rows, ends, after=last.of_rank, after_code=last.of_code)
    ranked = []
    for rank, index in neighbours:
        row = rows[rank]
        estimate = _estimate(problem, row, index, ends=ends, tails=tails, last=last, rank=rank)
        if (row[index], row[index + 1]) not in forbidden or estimate < best:
            ranked.append((estimate, chance.random(), rank, index))
    ranked.sort()
    for _, _, rank, index in ranked[:_MOST_SWAPS]:
        row = rows[rank]
        first, second = row[index], row[index + 1]
        swapped = [*row[:index], second, first, *row[index + 2 :]]
        move = _evaluated(problem, step_end, rows, rank, swapped, chance, tabu=(second, first))
        if move is not None:
            yield move
            return


def _estimate(
    problem: CodedProblem,
    row: Sequence[int],
    index: int,
    *,
    ends: Sequence[float],
    tails: Sequence[float],
    last: EndTails,
    rank: int,
) -> float:
    """The longest path through two neighbours that change places: nearly the new step time."""
    first, second = row[index], row[index + 1]
    duration = problem.duration
    free = ends[row[index - 1]] if index else 0.0
    second_end = max(free, _arrival(problem, second, ends)) + duration[second]
    first_end = max(second_end, _arrival(problem, first, ends)) + duration[first]
    rest = last.of_rank[rank]
    if index + 2 < len(row):
        follower = row[index + 2]
        rest = duration[follower] + tails[follower]
    own_first, own_second = (last.of_code.get(code, rest) for code in (first, second))
    first_tail = max(rest, own_first, problem.data_tail(first, tails))
    second_tail = max(
        duration[first] + first_tail, own_second, problem.data_tail(second, tails)
    )
    return max(first_end + first_tail, second_end + second_tail)


def _arrival(problem: CodedProblem, code: int, ends: Sequence[float]) -> float:
    maker = problem.needs[code]
    return ends[maker] + problem.hop[code] if maker >= 0 else 0.0


def _long_moves(
    problem: CodedProblem,
    step_end: StepEnd,
    rows: Rows,
    neighbours: Sequence[tuple[int, int]],
    chance: random.Random,
) -> Iterator[_Move]:
    """A few drawn moves of a critical action over several places."""
    for _ in range(_LONG_MOVES if neighbours else 0):
        rank, index = neighbours[chance.randrange(len(neighbours))]
        reach = chance.randint(2, _LONGEST_MOVE)
        row = rows[rank]
        if chance.random() < 0.5:
            moved = _shifted(problem, row, index + 1, max(0, index + 1 - reach))
        else:
            moved = _shifted(problem, row, index, min(len(row) - 1, index + reach))
        if moved is not None:
            move = _evaluated(problem, step_end, rows, rank, moved, chance, tabu=None)
            if move is not None:
                yield move


def _shifted(
    problem: CodedProblem, row: Sequence[int], at: int, target: int
) -> list[int] | None:
    """A row with one action moved as far as it may go; None where that is no further than a swap."""
    moved, start = list(row), at
    step = 1 if target > at else -1
    while at != target:
        first, second = min(at, at + step), max(at, at + step)
        if not problem.may_swap(moved[first], second=moved[second]):
            break
        moved[first], moved[second] = moved[second], moved[first]
        at += step
    return moved if abs(at - start) > 1 else None


def _evaluated(
    problem: CodedProblem,
    step_end: StepEnd,
    rows: Rows,
    rank: int,
    row: list[int],
    chance: random.Random,
    *,
    tabu: tuple[int, int] | None,
) -> _Move | None:
    """What a changed row makes of the order; None where it does not fit or run."""
    if not problem.fits(row, rank=rank):
        return None
    before, rows[rank] = rows[rank], row
    ends = problem.ends(rows)
    seconds = None if ends is None else step_end.seconds(rows, ends)
    rows[rank] = before
    if ends is None or seconds is None:
        return None
    return _Move(seconds, chance.random(), rank, row, ends, tabu)


def _critical_neighbours(
    problem: CodedProblem, step_end: StepEnd, rows: Rows, ends: Sequence[float]
) -> list[tuple[int, int]]:
    """(rank, index) of neighbours on one longest path that may change places."""
    position = {code: index for row in rows for index, code in enumerate(row)}
    code = step_end.critical(rows, ends)
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
