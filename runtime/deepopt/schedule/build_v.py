"""Orders for V placement, rank r with stages r and 2p-1-r: ZB-V, DualPipeV, V-Half.

Pure functions from (placement, directions) to the rows or actions of every rank; no verification. In
this file `low` is a rank's stage r and `high` its stage 2p-1-r; times are in units of F = I = W
= 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepopt.schedule.compact import Row, RowWriter, compact_rows, keep_microbatches
from deepopt.schedule.ir import Action, Direction, Op, Placement
from deepopt.schedule.list_scheduler import ListRules, list_schedule

_UNIT_TIME = {Op.F: 1.0, Op.I: 1.0, Op.W: 1.0, Op.B: 2.0}


def zb_v(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """No rank waits inside its own span when F = I = W, with activations of p micro-batches.

    Source: arXiv:2401.10241, section 6, for m >= 2p - 1; with fewer micro-batches the list
    scheduler does better than the published order with gaps, at the same memory.

    Args:
        placement: v.
        directions: direction of each micro-batch.
    """
    num_ranks, count = placement.num_ranks, len(directions)
    if count < 2 * num_ranks - 1:
        rules = ListRules(
            duration=lambda stage, op, rank: _UNIT_TIME.get(op, 0.0),
            cap=lambda stage, direction: num_ranks,
            split=True,
        )
        order = list_schedule(placement, directions=directions, rules=rules)
        return compact_rows(order, num_microbatches=count)
    rows = []
    for rank in range(num_ranks):
        low, high = rank, 2 * num_ranks - 1 - rank
        writer = RowWriter(num_microbatches=count)
        down = num_ranks - rank
        writer.add((low, Op.F), times=2 * down - 1)
        writer.add((high, Op.F), (low, Op.F), times=rank)
        writer.add((high, Op.F), (high, Op.I), (high, Op.W), times=down)
        group = ((low, Op.I), (low, Op.W), (high, Op.F), (high, Op.I), (high, Op.W))
        with_forward = count - writer.done(low, Op.F)
        writer.add((low, Op.F), *group, times=with_forward)
        writer.add(*group, times=count - writer.done(high, Op.F))
        writer.add((low, Op.I), (high, Op.I), times=rank)
        writer.add((low, Op.I), (low, Op.W), times=down)
        writer.add((high, Op.W), times=rank)
        writer.add((low, Op.W), times=rank)
        rows.append(writer.row)
    return tuple(rows)


def dual_pipe_v(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """The two halves of DualPipe on one copy: forwards and backwards of both stages in turn.

    The steady part pairs an F with a B, for executors that overlap the two; I and W come apart
    only in the cool-down. Fewer than 2p micro-batches leave gaps.

    Source: deepseek-ai/DualPipe (DualPipeV), for m >= 2p.

    Args:
        placement: v.
        directions: direction of each micro-batch.
    """
    num_ranks = placement.num_ranks
    count = max(len(directions), 2 * num_ranks)
    rows = []
    for rank in range(num_ranks):
        low, high = rank, 2 * num_ranks - 1 - rank
        writer = RowWriter(num_microbatches=count)
        up, after = rank + 1, num_ranks - rank - 1
        writer.add((low, Op.F), times=2 * after)
        writer.add((low, Op.F), (high, Op.F), times=up)
        writer.add((high, Op.I), (high, Op.W), (high, Op.F), times=after)
        steady = count - 2 * num_ranks + up
        writer.add((low, Op.F), (high, Op.B), (high, Op.F), (low, Op.B), times=steady)
        writer.add((high, Op.B), (high, Op.F), (low, Op.B), times=after)
        # The second half of these 2 * up backwards leaves its W for the gaps of the cool-down.
        late: list[int] = []
        for index, stage in enumerate([high, low] * up):
            if index < up:
                writer.add((stage, Op.B))
            else:
                writer.add((stage, Op.I))
                late.append(stage)
        for _ in range(after):
            writer.add((late.pop(0), Op.W), (low, Op.I))
            late.append(low)
        for stage in late:
            writer.add((stage, Op.W))
        rows.append(writer.row)
    return keep_microbatches(rows, made_for=count, keep=len(directions))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """When one micro-batch's ops start on each rank; the next one does the same 6 units later.

    Args:
        starts: starts[rank][(stage, op)].
        peak: stage micro-batches in flight on the worst rank.
    """

    starts: tuple[dict[tuple[int, Op], int], ...]
    peak: int


_INTERVAL = 6  # a rank's work on one micro-batch: F, I and W of two stages, one unit each


def v_half(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """About half of 1F1B's activations: (p + 2) // 2 micro-batches, bubble near 3(p-1) units.

    One building block is repeated every 6 units; its pace (2 units a hop on one leg of the V,
    1 on the other) sets the lifetime of activations. After a rank's last forward, memory only
    falls, so there the list scheduler goes on: gradients first, W in the gaps.

    Source: arXiv:2405.15362, sections 3 and 4 (V-Half).

    Args:
        placement: v.
        directions: direction of each micro-batch.
    """
    block = _smallest_block(placement.num_ranks)
    rows = []
    for starts in block.starts:
        timed = sorted(
            (start + _INTERVAL * m, stage, op, m)
            for (stage, op), start in starts.items()
            for m in range(len(directions))
        )
        row = [Action(stage, op, m) for _, stage, op, m in timed]
        last_forward = max(i for i, action in enumerate(row) if action.op is Op.F)
        rows.append(tuple(row[: last_forward + 1]))
    rules = ListRules(
        duration=lambda stage, op, rank: _UNIT_TIME.get(op, 0.0),
        cap=lambda stage, direction: len(directions),
        split=True,
    )
    order = list_schedule(placement, directions=directions, rules=rules, prefix=tuple(rows))
    return compact_rows(order, num_microbatches=len(directions))


def _smallest_block(num_ranks: int) -> _Block:
    """The block of V-Half's pace with the least memory, then the shortest."""
    blocks = list(_blocks(num_ranks))
    assert blocks, f"V-Half has a block for every number of ranks, found none for {num_ranks}"
    return min(
        blocks, key=lambda block: (block.peak, max(max(row.values()) for row in block.starts))
    )


def _blocks(num_ranks: int) -> Iterator[_Block]:
    """Every block of V-Half's pace: no two starts of a rank meet in the 6-unit cycle."""
    down, up = range(num_ranks), range(num_ranks)[::-1]
    forward_low = [2 * rank for rank in down]
    for turn_far in range(_INTERVAL):
        forward_high = _leg(num_ranks, forward_low[-1] + 1 + turn_far, order=up, pace=1)
        if _collide(forward_low, forward_high):
            continue
        for turn_near in range(_INTERVAL):
            input_high = _leg(num_ranks, forward_high[0] + 1 + turn_near, order=down, pace=2)
            if _collide(forward_low, forward_high, input_high):
                continue
            for turn_back in range(_INTERVAL):
                input_low = _leg(num_ranks, input_high[-1] + 1 + turn_back, order=up, pace=1)
                legs = (forward_low, forward_high, input_high, input_low)
                if not _collide(*legs):
                    yield _with_weights(num_ranks, *legs)


def _leg(num_ranks: int, start: int, *, order: range, pace: int) -> list[int]:
    times = [0] * num_ranks
    for hop, rank in enumerate(order):
        times[rank] = start + pace * hop
    return times


def _collide(*legs: Sequence[int]) -> bool:
    return any(
        len({time % _INTERVAL for time in times}) < len(times)
        for times in zip(*legs, strict=True)
    )


def _with_weights(
    num_ranks: int,
    forward_low: Sequence[int],
    forward_high: Sequence[int],
    input_high: Sequence[int],
    input_low: Sequence[int],
) -> _Block:
    """Put the two W into the two free units of each rank's cycle, with the least memory."""
    rows = []
    worst = 0
    for rank in range(num_ranks):
        low, high = rank, 2 * num_ranks - 1 - rank
        fixed = {
            (low, Op.F): forward_low[rank],
            (high, Op.F): forward_high[rank],
            (high, Op.I): input_high[rank],
            (low, Op.I): input_low[rank],
        }
        taken = {start % _INTERVAL for start in fixed.values()}
        first, second = (unit for unit in range(_INTERVAL) if unit not in taken)
        choices = []
        for unit_high, unit_low in ((first, second), (second, first)):
            weight_high = _next_at(input_high[rank], unit_high)
            weight_low = _next_at(input_low[rank], unit_low)
            lives = (
                (forward_low[rank], weight_low + 1),
                (forward_high[rank], weight_high + 1),
            )
            choices.append((_peak(lives), weight_high + weight_low, weight_high, weight_low))
        peak, _, weight_high, weight_low = min(choices)
        worst = max(worst, peak)
        rows.append({**fixed, (high, Op.W): weight_high, (low, Op.W): weight_low})
    return _Block(starts=tuple(rows), peak=worst)


def _next_at(time: int, unit: int) -> int:
    """The first time after an action's end that falls on a unit of the cycle."""
    return time + 1 + (unit - time - 1) % _INTERVAL


def _peak(lives: Sequence[tuple[int, int]]) -> int:
    """Most activations alive at once when each life [start, end) repeats every cycle."""
    return max(
        sum((unit - start) // _INTERVAL - (unit - end) // _INTERVAL for start, end in lives)
        for unit in range(_INTERVAL)
    )
