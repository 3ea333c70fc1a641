"""Improve an order step by step: swap neighbours on its critical path.

A small tabu search on integer-coded orders, deterministic by its seed and bounded by its effort.
It sees compute and hops; routes that fill up and updates at the end of a step are the simulator's
affair, which has the last word in `search`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deepopt.schedule.ir import Action, Direction, Op, Placement, Schedule
from deepopt.schedule.list_scheduler import Order
from deepopt.schedule.simulate import CostTable

_MOST_MOVES = 16  # swaps tried per step; more of them are drawn at random
_SHORTEST_TABU = 8
_LONGEST_TABU = 16

Rows = list[list[int]]
"""Per rank, actions by their code."""


class CodedProblem:
    """All actions of a step as integers, with their durations and dependencies.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage and hop.
    """

    def __init__(
        self, placement: Placement, *, directions: Sequence[Direction], costs: CostTable
    ) -> None:
        self.actions = [
            Action(stage, op, microbatch)
            for stage in range(placement.num_stages)
            for microbatch in range(len(directions))
            for op in (Op.F, Op.I, Op.W)
        ]
        self.code = {action: code for code, action in enumerate(self.actions)}
        self.rank: list[int] = []
        self.duration: list[float] = []
        self.needs: list[int] = []  # code of the input's maker, or -1
        self.hop: list[float] = []
        self.lane: list[tuple[int, Direction, Op]] = []
        for action in self.actions:
            assert action.microbatch is not None, f"{action} was made with a micro-batch"
            direction = directions[action.microbatch]
            rank = placement.rank_of(action.stage, direction)
            factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
            maker = _maker(action, placement.num_stages)
            self.rank.append(rank)
            self.duration.append(costs.duration_s(action.stage, op=action.op) * factor)
            self.lane.append((action.stage, direction, action.op))
            self.needs.append(-1 if maker is None else self.code[maker])
            source = rank if maker is None else placement.rank_of(maker.stage, direction)
            self.hop.append(costs.hop_between(source, target=rank))
        self.holds = [
            {Op.F: 1, Op.W: -1}.get(action.op, 0) for action in self.actions
        ]  # change of micro-batches in flight

    def encode(self, schedule: Schedule) -> Rows:
        """The rows of a schedule, each B as I and W.

        Args:
            schedule: of the same placement and directions, without R.
        """
        return [
            [
                self.code[Action(action.stage, op, action.microbatch)]
                for action in row
                for op in ((Op.I, Op.W) if action.op is Op.B else (action.op,))
            ]
            for row in schedule.actions
        ]

    def decode(self, rows: Sequence[Sequence[int]]) -> Order:
        """Actions per rank.

        Args:
            rows: codes per rank.
        """
        return tuple(tuple(self.actions[code] for code in row) for row in rows)

    def ends(self, rows: Sequence[Sequence[int]]) -> list[float] | None:
        """When each action ends, by its code; None when the rows deadlock.

        Args:
            rows: codes per rank.
        """
        needs, hop, duration = self.needs, self.hop, self.duration
        end = [-1.0] * len(self.actions)
        waiting = [-1] * len(self.actions)
        at = [0] * len(rows)
        free = [0.0] * len(rows)
        todo = list(range(len(rows)))
        left = len(self.actions)
        while todo:
            rank = todo.pop()
            row, index, now = rows[rank], at[rank], free[rank]
            start_index = index
            while index < len(row):
                code = row[index]
                maker = needs[code]
                if maker >= 0:
                    arrival = end[maker]
                    if arrival < 0:
                        # An I and a W may wait for the same action, but never on two ranks.
                        waiting[maker] = rank
                        break
                    arrival += hop[code]
                    if arrival > now:
                        now = arrival
                now += duration[code]
                end[code] = now
                index += 1
                if waiting[code] >= 0 and waiting[code] != rank:
                    todo.append(waiting[code])
            left -= index - start_index
            at[rank], free[rank] = index, now
        return None if left else end

    def fits(self, row: Sequence[int], memory_cap: int | None) -> bool:
        """Whether a rank stays within its memory.

        Args:
            row: codes of one rank.
            memory_cap: most stage micro-batches in flight; None for any number.
        """
        if memory_cap is None:
            return True
        held = 0
        for code in row:
            held += self.holds[code]
            if held > memory_cap:
                return False
        return True

    def may_swap(self, first: int, second: int) -> bool:
        """Whether two neighbours of a row are free to change places.

        Args:
            first: the code that stands before.
            second: the code right after it.
        """
        return self.needs[second] != first and self.lane[first] != self.lane[second]


def improve(
    problem: CodedProblem, rows: Rows, *, memory_cap: int | None, effort: int, seed: int
) -> Rows:
    """A better order, or the same: swaps of neighbours along the critical path.

    Args:
        problem: what the rows order.
        rows: a right order within the memory.
        memory_cap: most stage micro-batches in flight on a rank.
        effort: actions to evaluate, over all tries.
        seed: of the random choices.
    """
    chance = random.Random(seed)
    current = [list(row) for row in rows]
    ends = problem.ends(current)
    assert ends is not None, "local search starts from an order that runs"
    best, best_rows = max(ends), [list(row) for row in current]
    tabu: dict[tuple[int, int], int] = {}
    tries = effort // max(1, len(ends))
    step = 0
    while tries > 0:
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
            if not problem.fits(swapped, memory_cap):
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
            kicked = _kick(problem, current, memory_cap, chance)
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


def _maker(action: Action, num_stages: int) -> Action | None:
    """The action whose result an F, I or W waits for."""
    if action.op is Op.W:
        return Action(action.stage, Op.I, action.microbatch)
    if action.op is Op.F:
        return Action(action.stage - 1, Op.F, action.microbatch) if action.stage else None
    if action.stage == num_stages - 1:
        return Action(action.stage, Op.F, action.microbatch)
    return Action(action.stage + 1, Op.I, action.microbatch)


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
        slack = 1e-9 * (1 + start)
        if maker >= 0 and ends[maker] + problem.hop[code] >= start - slack:
            if before >= 0 and ends[before] >= start - slack and problem.may_swap(before, code):
                moves.append((rank, index - 1))
            code = maker
        elif before >= 0 and ends[before] >= start - slack:
            if problem.may_swap(before, code):
                moves.append((rank, index - 1))
            code = before
        else:
            return moves


def _kick(
    problem: CodedProblem, rows: Rows, memory_cap: int | None, chance: random.Random
) -> list[float] | None:
    """Swap some pair of neighbours, in place; None when the drawn pair cannot be swapped."""
    rank = chance.randrange(len(rows))
    row = rows[rank]
    if len(row) < 2:
        return None
    index = chance.randrange(len(row) - 1)
    if not problem.may_swap(row[index], row[index + 1]):
        return None
    swapped = [*row[:index], row[index + 1], row[index], *row[index + 2 :]]
    if not problem.fits(swapped, memory_cap):
        return None
    rows[rank] = swapped
    ends = problem.ends(rows)
    if ends is None:
        rows[rank] = row
    return ends
