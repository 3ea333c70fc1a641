"""The one event simulation: when each action of an order starts and ends.

One flat loop over integer codes, because p = 1024 means millions of actions. It knows durations and
hops as plain numbers; what they mean, and what follows from the times, is the affair of
`simulate`.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from typing import TypeAlias

from deepopt.errors import ScheduleError
from deepopt.schedule.compact import CODE_OF_OP, OP_BITS, OP_MASK, CompactSchedule
from deepopt.schedule.ir import Direction, Op

Times: TypeAlias = "array[float]"
"""Seconds since the start of the step, one for each action of a rank."""

_UNKNOWN = -1.0
_IDLE = -1
_FIRST_WITHOUT_INPUT = 3
_MOST_BACKGROUND = (
    0.9  # of the cores: the scheduler of the operating system leaves nobody with nothing
)
assert {op: code for op, code in CODE_OF_OP.items() if code < _FIRST_WITHOUT_INPUT} == {
    Op.F: 0,
    Op.I: 1,
    Op.B: 2,
}, "the loop tells F, I and B by their codes"
_PREPARE = CODE_OF_OP[Op.R]


def run(
    schedule: CompactSchedule,
    *,
    duration_s: Sequence[Sequence[float]],
    rank_factor: Sequence[float],
    hop_s: Callable[[int, int], tuple[float, float]],
    cores: int | None,
    unprepared_s: Sequence[float] = (),
    message_s: float = 0.0,
    ready_s: Sequence[float] = (),
    host_s: Sequence[Sequence[float]] = (),
    background: float = 0.0,
) -> tuple[tuple[Times, ...], tuple[Times, ...]]:
    """Start and end of every action, per rank.

    A rank goes on until its next input is not known yet; then it waits for the maker to wake it.
    With shared cores, ranks take turns in the order in which their next actions are ready.

    Args:
        schedule: the order of each rank.
        duration_s: duration_s[op][stage] on a rank of factor 1, op as in `compact.OPS`.
        rank_factor: multiplies all compute of a rank.
        hop_s: hop_s(source, target): how long a tensor occupies its route, and from then to its
            arrival.
        cores: host cores that the ranks share; None where each has a device of its own.
        unprepared_s: of each stage, what an I or B takes on top where its micro-batch had no R;
            empty for nothing.
        message_s: what each end of a message between ranks takes of its rank, and of a core: after
            the action that makes the tensor, and with the one that uses it.
        ready_s: when each rank is free to begin; empty for at once. With shared cores, what
            it does until then keeps a core busy.
        host_s: as duration_s, how long an action keeps a core busy, from its start; empty where that is as
            long as it lasts. Then what ranks do until they are free keeps no core busy.
        background: cores that other work takes on average of those that the ranks share. It finds a core that
            no rank uses where there is one; an action that takes the last one is longer by its part.

    Raises:
        ScheduleError: the order deadlocks.
    """
    placement, rows = schedule.placement, schedule.rows
    count, num_ranks = schedule.num_microbatches, placement.num_ranks
    last_stage = placement.num_stages - 1
    rank_of = None if placement.up is None else _ranks_by_microbatch(schedule)
    down = placement.down
    # By 2 x unit for the input of F, + 1 for the gradient that I or B waits for. A unit is
    # stage x micro-batches + micro-batch. Ends of the chain have all they need from the start.
    arrival = array("d", [_UNKNOWN]) * (2 * placement.num_stages * count)
    arrival[0 : 2 * count : 2] = array("d", bytes(8 * count))
    arrival[2 * last_stage * count + 1 :: 2] = array("d", bytes(8 * count))
    came = bytearray(len(arrival) if message_s else 0)  # from another rank
    prepared = bytearray(placement.num_stages * count if unprepared_s else 0)
    blocked = [_IDLE] * num_ranks
    # By source, then target: occupancy, latency, and when the route is free (forward, backward).
    routes: list[dict[int, list[float]]] = [{} for _ in range(num_ranks)]
    at = [0] * num_ranks
    free_at = list(ready_s) or [0.0] * num_ranks
    starts = tuple(array("d", bytes(8 * len(row))) for row in rows)
    ends = tuple(array("d", bytes(8 * len(row))) for row in rows)
    shared = cores is not None
    core_free = [0.0] * (cores or 0)
    crowded = _crowded(cores, background)
    if shared and ready_s and not host_s:
        longer = crowded if num_ranks >= len(core_free) else 1.0
        free_at = _in_turns([seconds * longer for seconds in ready_s], core_free)
    todo = [(free, rank) for rank, free in enumerate(free_at)]
    heapq.heapify(todo)
    while todo:
        turn, rank = heapq.heappop(todo) if shared else todo.pop()
        row, index, free = rows[rank], at[rank], free_at[rank]
        start_of, end_of, links = starts[rank], ends[rank], routes[rank]
        factor, size = rank_factor[rank], len(row)
        blocked[rank] = _IDLE
        while index < size:
            code = row[index]
            op = code & OP_MASK
            unit = code >> OP_BITS
            stage = unit // count
            start = free
            if op < _FIRST_WITHOUT_INPUT:
                needs = 2 * unit + 1 if op else 2 * unit
                arrived = arrival[needs]
                if arrived < 0:
                    blocked[rank] = needs
                    break
                if arrived > start:
                    start = arrived
            if shared:
                if start > turn:
                    heapq.heappush(todo, (start, rank))
                    break
                turn = _UNKNOWN  # one action a turn
                start = max(start, heapq.heappop(core_free))
            free = start + duration_s[op][stage] * factor
            if unprepared_s:
                if op == _PREPARE:
                    prepared[unit] = 1
                elif 0 < op < _FIRST_WITHOUT_INPUT and not prepared[unit]:
                    free += unprepared_s[stage] * factor
            if message_s:
                free += message_s * _num_ends(
                    op, came, unit, stage, last_stage, rank, count, down, rank_of
                )
            if shared:
                if not core_free or core_free[0] > start:  # all others are busy
                    free = start + (free - start) * crowded
                busy_until = min(free, start + host_s[op][stage]) if host_s else free
                heapq.heappush(core_free, busy_until)
            start_of[index] = start
            end_of[index] = free
            index += 1
            if op == 0:
                if stage == last_stage:
                    continue
                user, made, backward = stage + 1, 2 * (unit + count), 2
            elif op < _FIRST_WITHOUT_INPUT:
                if not stage:
                    continue
                user, made, backward = stage - 1, 2 * (unit - count) + 1, 3
            else:
                continue
            target = down[user] if rank_of is None else rank_of[unit - stage * count][user]
            arrived = free
            if target != rank:
                link = links.get(target)
                if link is None:
                    link = links[target] = [*hop_s(rank, target), 0.0, 0.0]
                occupied_s = link[0]
                if occupied_s:
                    if link[backward] > arrived:
                        arrived = link[backward]
                    arrived += occupied_s
                    link[backward] = arrived
                arrived += link[1]
                if message_s:
                    came[made] = 1
            arrival[made] = arrived
            if blocked[target] == made:
                blocked[target] = _IDLE
                entry = (max(free_at[target], arrived), target)
                if shared:
                    heapq.heappush(todo, entry)
                else:
                    todo.append(entry)
        at[rank], free_at[rank] = index, free
    for rank, row in enumerate(rows):
        if at[rank] < len(row):
            raise ScheduleError(
                f"schedule {schedule.name} stands still: rank {rank} waits for ever "
                f"before {schedule.action(row[at[rank]])}",
                remedy="verify the schedule to see why",
            )
    return starts, ends


def _crowded(cores: int | None, background: float) -> float:
    """How many times as long work takes while all cores are busy, where other work wants a part of them."""
    if cores is None or not background:
        return 1.0
    return cores / (cores - min(background, _MOST_BACKGROUND * cores))


def _in_turns(work_s: Sequence[float], core_free: list[float]) -> list[float]:
    """When each rank has done its work, the first ranks first, on cores that it keeps busy."""
    ends = []
    for seconds in work_s:
        ends.append(heapq.heappop(core_free) + seconds)
        heapq.heappush(core_free, ends[-1])
    return ends


def _num_ends(
    op: int,
    came: bytearray,
    unit: int,
    stage: int,
    last_stage: int,
    rank: int,
    count: int,
    down: Sequence[int],
    rank_of: Sequence[Sequence[int]] | None,
) -> int:
    """Ends of messages between ranks that an action has to do with: 0, 1 or 2."""
    if op >= _FIRST_WITHOUT_INPUT:
        return 0
    received = came[2 * unit + 1 if op else 2 * unit]
    user = stage - 1 if op else stage + 1
    if not 0 <= user <= last_stage:
        return received
    target = down[user] if rank_of is None else rank_of[unit - stage * count][user]
    return received + (target != rank)


def _ranks_by_microbatch(schedule: CompactSchedule) -> list[tuple[int, ...]]:
    """ranks[microbatch][stage], where micro-batches go both ways."""
    placement = schedule.placement
    assert placement.up is not None, "with one direction, all micro-batches take the same ranks"
    return [
        placement.down if direction is Direction.DOWN else placement.up
        for direction in schedule.directions
    ]
