"""Improve an order by scheduling it anew, from its end to its start and from its start to its end in turns.

A list scheduler decides well where it begins and pays at the other side: what it did too early is missing
later. So each pass takes the times of the order before as priorities, once in reversed time (what ended last
goes first) and once forward (what may start last goes last), with a little noise. Deterministic by its
seed, bounded by its effort. Memory and lanes are treated as in `list_scheduler`.

Source: forward-backward improvement, K. Li and R. Willis, "An iterative scheduling technique for
resource-constrained project scheduling", EJOR 56 (1992); V. Valls, F. Ballestin, S. Quintanilla,
"Justification and RCPSP", EJOR 165 (2005).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import NamedTuple

from deepopt.schedule.coding import CodedProblem, Rows
from deepopt.schedule.compact import CODE_OF_OP, OP_BITS
from deepopt.schedule.ir import Direction, Op
from deepopt.schedule.step_end import EndTails, StepEnd

ACTIONS_PER_ROUND = 4
"""Actions that the list scheduler schedules while a round, of two passes, takes in one."""

_F, _I, _W, _R = (CODE_OF_OP[op] for op in (Op.F, Op.I, Op.W, Op.R))
_INFINITE = float("inf")
_NOISE = (0.0, 0.2, 0.6)  # of a mean duration
_PATIENCE = (0.0, 0.5, 1.0)  # of a duration: who waits for something better that is under way
_SLACK = 1e-9  # of a memory, for the rounding of sums


def rebuild(
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
        effort: as for the list scheduler, in actions to schedule.
        seed: of the random choices.
        target_s: an order that takes no longer is good enough: stop.
        step_end: says how long a step takes; None: until the end of its last action.
    """
    chance = random.Random(seed)
    step_end = step_end or StepEnd(problem)
    forward, backward = _Pass(problem), _Pass(problem, is_reversed=True)
    durations = [problem.duration[code] for row in rows for code in row]
    mean_s = sum(durations) / max(1, len(durations))
    start = _timed(problem, step_end, rows)
    assert start is not None, "it starts from an order that runs within the memory"
    best = current = start
    enough = target_s * (1 + _SLACK)
    for _ in range(effort // max(1, ACTIONS_PER_ROUND * problem.num_actions)):
        if best.seconds <= enough:
            break
        noise_s = mean_s * chance.choice(_NOISE)
        tried = current
        for one in (backward, forward):
            after = step_end.tails(tried.rows, tried.ends)
            if one is backward:
                keys = [-end for end in tried.ends]
            else:
                tails = problem.tails(
                    tried.rows, tried.ends, after=after.of_rank, after_code=after.of_code
                )
                keys = [
                    -tail - took for tail, took in zip(tails, problem.duration, strict=True)
                ]
            if noise_s:
                keys = [key + chance.gauss(0.0, noise_s) for key in keys]
            found = one.run(keys, patience=chance.choice(_PATIENCE), after=after)
            made = None if found is None else _timed(problem, step_end, found)
            if made is None:
                break
            tried = made
            # The first pass alone may be the better one; the second goes on from it in any case.
            if tried.seconds <= current.seconds:
                current = tried
        if current.seconds < best.seconds:
            best = current
    return best.rows


class _Timed(NamedTuple):
    """An order and how long it takes."""

    seconds: float
    rows: Rows
    ends: list[float]


def _timed(problem: CodedProblem, step_end: StepEnd, rows: Rows) -> _Timed | None:
    """None where it deadlocks or does not fit the memory."""
    if not all(problem.fits(row, rank=rank) for rank, row in enumerate(rows)):
        return None
    ends = problem.ends(rows)
    return None if ends is None else _Timed(step_end.seconds(rows, ends), rows, ends)


class _Pass:
    """A list scheduler that starts, of what may start, the action with the lowest key.

    Each lane (one stage in one direction) goes through its micro-batches in one order, op by op: F, R, I
    and W, or in reversed time W, I, R and F of the last micro-batch first. The first op takes a slot in the
    memory; a slot is kept for each lane with nothing in flight, so no order can starve.

    Args:
        problem: what is to be ordered.
        is_reversed: from the end of the step to its start.
    """

    def __init__(self, problem: CodedProblem, *, is_reversed: bool = False) -> None:
        self._problem = problem
        self._is_reversed = is_reversed
        self._lanes_of: list[list[int]] = [[] for _ in range(problem.placement.num_ranks)]
        # By lane and op of its chain.
        self._codes: list[list[list[int]]] = []  # of its turns
        self._arrives: list[
            list[list[float]]
        ] = []  # what each turn needs; 0 where nothing has to
        self._goes_to: list[list[tuple[int, int] | None]] = []  # who gets what it makes
        self._takes: list[list[float]] = []  # memory, when it starts
        self._frees: list[list[float]] = []  # when it has ended
        self._due: list[list[int]] = []  # the op whose input says that this one is due
        for direction in dict.fromkeys(problem.directions):
            self._add(direction)
        self._reserve = [
            max((take for lane in own for take in self._takes[lane][1:]), default=0.0)
            for own in self._lanes_of
        ]

    def _add(self, direction: Direction) -> None:
        problem, is_reversed = self._problem, self._is_reversed
        placement = problem.placement
        microbatches = [m for m, d in enumerate(problem.directions) if d is direction]
        chains = [
            [op for op in (_F, _R, _I, _W) if op != _R or problem.has_prepare[stage]]
            for stage in range(placement.num_stages)
        ]
        takes, frees = problem.takes, problem.frees
        if is_reversed:
            microbatches.reverse()
            for chain in chains:
                chain.reverse()
            takes, frees = frees, takes
        first, last = len(self._codes), placement.num_stages - 1
        # F goes up the stages and I down; in reversed time the other way.
        steps = {_F: -1, _I: 1} if is_reversed else {_F: 1, _I: -1}
        for stage, chain in enumerate(chains):
            self._lanes_of[placement.rank_of(stage, direction)].append(first + stage)
            codes = [
                [((stage * problem.count + m) << OP_BITS) | op for m in microbatches]
                for op in chain
            ]
            self._codes.append(codes)
            self._takes.append([takes[turns[0]] for turns in codes])
            self._frees.append([frees[turns[0]] for turns in codes])
            self._due.append(
                [at if op != _R else chain.index(_I) for at, op in enumerate(chain)]
            )
            arrives: list[list[float]] = []
            goes_to: list[tuple[int, int] | None] = []
            for op in chain:
                step = steps.get(op)
                source, target = (-1, -1) if step is None else (stage - step, stage + step)
                waits = 0 <= source <= last
                arrives.append([_INFINITE if waits else 0.0] * len(microbatches))
                is_sent = 0 <= target <= last
                goes_to.append((first + target, chains[target].index(op)) if is_sent else None)
            self._arrives.append(arrives)
            self._goes_to.append(goes_to)

    def run(
        self, keys: Sequence[float], *, patience: float, after: EndTails | None = None
    ) -> Rows | None:
        """The order, in the order of real time; None where the memory stops it.

        Args:
            keys: by code; the lowest goes first.
            patience: nothing starts when something with a lower key arrives within this share of its
                duration.
            after: what follows the ends of ranks and actions: in reversed time it comes before them.
        """
        # One flat function, as in `list_scheduler`.
        problem, codes, goes_to = self._problem, self._codes, self._goes_to
        takes, frees, due, reserve = self._takes, self._frees, self._due, self._reserve
        duration, hop, rank_of = problem.duration, problem.hop, problem.rank
        arrives = [[list(times) for times in lane] for lane in self._arrives]
        done = [[0] * len(lane) for lane in codes]
        num = [len(lane[0]) for lane in codes]
        free_at = [0.0] * len(self._lanes_of)
        if self._is_reversed and after is not None:
            least = min(after.of_rank)
            free_at = [time - least for time in after.of_rank]
            for lane, (of_first, first_arrives) in enumerate(zip(codes, arrives, strict=True)):
                for turn, code in enumerate(of_first[0]):
                    time = after.of_code.get(code, least) - least
                    arrives[lane][0][turn] = max(first_arrives[0][turn], time)
        wake = [(time, rank) for rank, time in enumerate(free_at)]
        wake += [
            (time, rank_of[of_first[0][0]])
            for of_first, lane in zip(codes, arrives, strict=True)
            for time in lane[0]
            if 0.0 < time < _INFINITE
        ]
        heapq.heapify(wake)
        caps = [cap * (1 + _SLACK) for cap in problem.memory.caps]
        held = [0.0] * len(free_at)
        rows: Rows = [[] for _ in free_at]
        left = problem.num_actions
        push, pop = heapq.heappush, heapq.heappop
        while wake:
            now, rank = pop(wake)
            if free_at[rank] > now:
                continue
            own = self._lanes_of[rank]
            room = caps[rank] - reserve[rank] - held[rank]
            for lane in own:
                turns = done[lane]
                if turns[0] == turns[-1] and turns[0] < num[lane]:
                    room -= takes[lane][0]
            best = _INFINITE
            chosen = chosen_op = -1
            coming: list[tuple[float, float]] = []  # key and arrival
            for lane in own:
                turns, lane_arrives, lane_takes = done[lane], arrives[lane], takes[lane]
                allowed = num[lane]
                for op, turn in enumerate(turns):
                    if turn < allowed:
                        at, take = lane_arrives[op][turn], lane_takes[op]
                        if op == 0:
                            fits = take <= room or turn == turns[-1]
                        elif take:
                            is_due = lane_arrives[due[lane][op]][turn] <= now
                            fits = take <= room + (reserve[rank] if is_due else 0.0)
                        else:
                            fits = True
                        if fits and at < _INFINITE:
                            key = keys[codes[lane][op][turn]]
                            if at > now:
                                coming.append((key, at))
                            elif key < best:
                                best, chosen, chosen_op = key, lane, op
                    allowed = turn
            if chosen < 0:
                continue
            turn = done[chosen][chosen_op]
            code = codes[chosen][chosen_op][turn]
            if patience:
                until = now + patience * duration[code]
                if any(key < best and at < until for key, at in coming):
                    continue
            end = free_at[rank] = now + duration[code]
            rows[rank].append(code)
            left -= 1
            done[chosen][chosen_op] += 1
            held[rank] += takes[chosen][chosen_op] - frees[chosen][chosen_op]
            push(wake, (end, rank))
            target = goes_to[chosen][chosen_op]
            if target is not None:
                lane, op = target
                to = codes[lane][op][turn]
                arrival = end + hop[code if self._is_reversed else to]
                arrives[lane][op][turn] = arrival
                push(wake, (arrival, rank_of[to]))
        if left:
            return None
        return [row[::-1] for row in rows] if self._is_reversed else rows
