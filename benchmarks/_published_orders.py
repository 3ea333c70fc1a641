"""The orders behind published throughputs, from a cost table.

1F1B, 1F1B-I, ZB-H1 (whose bubble rates are those of ZB-1p), ZB-H2 and ZB-V are builders of deepopt. ZB-2p is
an order searched by its authors; `weights_in_gaps` follows the rules they give.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil, inf

from deepopt.schedule.builders import build_compact
from deepopt.schedule.compact import CompactSchedule, Row, RowWriter
from deepopt.schedule.ir import Direction, Op, Placement, PlacementKind, place
from deepopt.schedule.simulate import CompactTimeline, CostTable, simulate_compact

_BUILDERS = {
    "1F1B": ("1f1b", PlacementKind.LINE),
    "1F1B-I": ("interleaved_1f1b", PlacementKind.LINE),
    "ZB-1p": ("zb_h1", PlacementKind.LINE),
    "ZB-H2": ("zb_h2", PlacementKind.LINE),
    "ZB-V": ("zb_v", PlacementKind.V),
    "ZB-2p": (None, PlacementKind.LINE),
}
OVERLAPS_STEPS = frozenset({"ZB-1p", "ZB-H2", "ZB-2p", "ZB-V"})
"""Run with post-validated updates: a rank begins the next step when it has ended this one."""

_GAPS = (0.25, 0.5)  # shares of a W that are worth one
_EXTRA_FORWARDS = (0.0, 0.5, 1.0)


def placement_of(name: str, *, num_ranks: int, chunks: int) -> Placement:
    """How a published schedule lays out its stages.

    Args:
        name: as published.
        num_ranks: pipeline ranks.
        chunks: stages of a rank where the schedule interleaves.
    """
    stages_per_rank = chunks if name == "1F1B-I" else 1
    return place(_BUILDERS[name][1], num_ranks=num_ranks, stages_per_rank=stages_per_rank)


def run_published(
    name: str,
    *,
    placement: Placement,
    num_microbatches: int,
    costs: CostTable,
    weight_memory: float,
) -> CompactTimeline:
    """Simulate a published schedule.

    Args:
        name: as published.
        placement: from `placement_of`.
        num_microbatches: of a step.
        costs: of its stages.
        weight_memory: what a micro-batch holds between I and W, against what it holds before.
    """
    builder, directions = _BUILDERS[name][0], (Direction.DOWN,) * num_microbatches
    if builder is not None:
        schedule = build_compact(builder, placement=placement, directions=directions)
        return simulate_compact(schedule, costs)
    timelines = []
    for gap in _GAPS:
        for extra in _EXTRA_FORWARDS:
            rows = weights_in_gaps(
                costs,
                num_microbatches=num_microbatches,
                memory=2.0 * placement.num_ranks,
                weight_memory=weight_memory,
                gap=gap,
                extra=extra,
            )
            schedule = CompactSchedule(
                name=name, placement=placement, directions=directions, rows=rows
            )
            if schedule.num_actions == 3 * num_microbatches * placement.num_ranks:
                timelines.append(simulate_compact(schedule, costs))
    return min(timelines, key=lambda timeline: timeline.steady_s)


def weights_in_gaps(
    costs: CostTable,
    *,
    num_microbatches: int,
    memory: float,
    weight_memory: float,
    gap: float,
    extra: float,
) -> tuple[Row, ...]:
    """As many forwards as fit before the first gradient, then F and I in turn, W in the gaps.

    Source: arXiv:2401.10241, section 3.1 and appendix B.

    Args:
        costs: one stage a rank.
        num_microbatches: of a step.
        memory: micro-batches that a rank can hold.
        weight_memory: share that a micro-batch still holds between I and W.
        gap: a gap of this share of a W, or longer, takes one.
        extra: forwards added to the warm-up of a rank, before rounding down.
    """
    num_ranks = len(costs.forward_s)
    forward, inputs, weight = costs.forward_s, costs.input_s, costs.weight_s
    scripts = []
    for rank in range(num_ranks):
        until_gradient = sum(
            forward[r] + inputs[r] + 2 * costs.hop_between(r - 1, target=r)
            for r in range(rank + 1, num_ranks)
        )
        most = min(num_microbatches, ceil(memory)) - 1
        warm_up = max(0, min(most, int(until_gradient / forward[rank] + extra)))
        turns = [Op.F, Op.I] * (num_microbatches - warm_up)
        scripts.append([*[Op.F] * warm_up, *turns, *[Op.I] * warm_up])
    writers = [RowWriter(num_microbatches=num_microbatches) for _ in range(num_ranks)]
    arrivals = {
        Op.F: [[0.0 if rank == 0 else inf] * num_microbatches for rank in range(num_ranks)],
        Op.I: [[inf] * num_microbatches for _ in range(num_ranks)],
    }
    position, free_at = [0] * num_ranks, [0.0] * num_ranks
    wake = [(0.0, rank) for rank in range(num_ranks)]

    def deliver(op: Op, microbatch: int, end: float, *, source: int, target: int) -> None:
        arrival = end + costs.hop_between(source, target=target)
        arrivals[op][target][microbatch] = arrival
        heapq.heappush(wake, (max(arrival, free_at[target]), target))

    while wake:
        now, rank = heapq.heappop(wake)
        if now < free_at[rank]:
            continue
        op = _next(scripts[rank], position[rank])
        writer = writers[rank]
        started = {each: writer.done(rank, each) for each in (Op.F, Op.I, Op.W)}
        pending = started[Op.I] - started[Op.W]
        ready = inf if op is None else arrivals[op][rank][started[op]]
        held = started[Op.F] - started[Op.I] + pending * weight_memory
        full = op is Op.F and held + 1 > memory
        if pending and (full or ready - now >= gap * weight[rank]):
            writer.add((rank, Op.W))
            free_at[rank] = now + weight[rank]
        elif op is None or full or ready == inf:
            continue
        elif ready > now:
            heapq.heappush(wake, (ready, rank))
            continue
        else:
            position[rank] += 1
            writer.add((rank, op))
            end = free_at[rank] = now + (forward if op is Op.F else inputs)[rank]
            if op is Op.F and rank < num_ranks - 1:
                deliver(op, started[op], end, source=rank, target=rank + 1)
            elif op is Op.F:
                arrivals[Op.I][rank][started[op]] = end
            elif rank:
                deliver(op, started[op], end, source=rank, target=rank - 1)
        heapq.heappush(wake, (free_at[rank], rank))
    return tuple(writer.row for writer in writers)


def _next(script: Sequence[Op], position: int) -> Op | None:
    return script[position] if position < len(script) else None
