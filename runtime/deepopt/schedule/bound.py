"""A time that no schedule can beat: how good a found schedule is, without knowing the best.

Pure. The bound holds for every order of F, R, I and W (so for B too) on the given placement and
within the given memory; it does not say that an order of that length exists.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from deepopt.schedule.ir import Direction, Op, Placement
from deepopt.schedule.memory import Memory
from deepopt.schedule.simulate import CostTable


class _Job(NamedTuple):
    """One action seen from its rank: when it may start, how long it takes, what must follow."""

    head: float
    duration: float
    tail: float
    op: Op


def lower_bound_s(
    placement: Placement,
    *,
    directions: Sequence[Direction],
    costs: CostTable,
    memory: Memory | None = None,
) -> float:
    """The greatest, over all ranks, of the shortest preemptive plan of the rank's own work.

    Each action gets a head (chains of dependencies and of its predecessors on one stage) and a
    tail (the same, towards the end); one rank with heads and tails is solved exactly when
    actions may be interrupted, which bounds the case where they may not. With a memory, an F
    waits for as many W as must have freed what it takes: first counted by stage, with what must
    follow the F; then over all F of the rank, whichever comes first.

    Source: J. Carlier, "The one-machine sequencing problem", EJOR 11 (1982), the preemptive bound.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage and hop.
        memory: what micro-batches hold and ranks can hold; None for any amount.
    """
    memory = memory or Memory.counted(placement, cap=None)
    jobs: list[list[_Job]] = [[] for _ in range(placement.num_ranks)]
    for direction in Direction:
        count = sum(d is direction for d in directions)
        if count:
            stream = _Stream.of(placement, direction, costs=costs, memory=memory)
            for rank, job in _jobs(stream, count):
                jobs[rank].append(job)
    bound = 0.0
    for rank, own in enumerate(jobs):
        factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
        update_s = (
            sum(costs.update_s[s] for s in placement.stages_of(rank)) * factor
            if costs.update_s
            else 0.0
        )
        # The updates of a rank follow its last action, so they follow every action.
        charged = [job._replace(tail=max(job.tail, update_s)) for job in own]
        bound = max(bound, _preemptive(charged), update_s)
        if memory.caps[rank] < float("inf"):
            kept = [memory.kept[stage] for stage in placement.stages_of(rank)]
            relaxed = _in_any_order(charged, cap=memory.caps[rank], kept=kept, tail=update_s)
            bound = max(bound, _preemptive(relaxed))
    return bound


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """What one direction's micro-batches meet, by stage.

    Args:
        ranks: who runs the stage.
        forward: F, and so on, on that rank.
        hop: from each stage to the next.
        room: the rank's memory over what one micro-batch keeps on this stage: how many fit.
        shared: what one micro-batch keeps on the rank, on this stage and the ones before it.
        lanes: stages of the same rank up to this one, itself included.
        largest: the most that one of `lanes` keeps.
        cap: the rank's memory.
    """

    ranks: tuple[int, ...]
    forward: tuple[float, ...]
    prepare: tuple[float, ...]
    inputs: tuple[float, ...]
    weight: tuple[float, ...]
    hop: tuple[float, ...]
    room: tuple[int | None, ...]
    shared: tuple[float, ...]
    lanes: tuple[tuple[int, ...], ...]
    largest: tuple[float, ...]
    cap: tuple[float, ...]

    @classmethod
    def of(
        cls, placement: Placement, direction: Direction, *, costs: CostTable, memory: Memory
    ) -> _Stream:
        stages = range(placement.num_stages)
        ranks = tuple(placement.rank_of(stage, direction) for stage in stages)
        factor = [costs.rank_factor[rank] if costs.rank_factor else 1.0 for rank in ranks]
        prepare = costs.prepare_s or (0.0,) * placement.num_stages
        lanes = tuple(tuple(s for s in range(t + 1) if ranks[s] == ranks[t]) for t in stages)
        kept = memory.kept
        cap = tuple(memory.caps[rank] * (1 + 1e-9) for rank in ranks)
        return cls(
            ranks=ranks,
            forward=tuple(costs.forward_s[s] * factor[s] for s in stages),
            prepare=tuple(prepare[s] * factor[s] for s in stages),
            inputs=tuple(costs.input_s[s] * factor[s] for s in stages),
            weight=tuple(costs.weight_s[s] * factor[s] for s in stages),
            hop=tuple(costs.hop_between(a, target=b) for a, b in pairwise(ranks)),
            room=tuple(
                int(cap[s] // kept[s]) if kept[s] and cap[s] < float("inf") else None
                for s in stages
            ),
            shared=tuple(sum(kept[s] for s in lanes[t]) for t in stages),
            lanes=lanes,
            largest=tuple(max(kept[s] for s in lanes[t]) for t in stages),
            cap=cap,
        )


def _jobs(stream: _Stream, count: int) -> Iterator[tuple[int, _Job]]:
    """Every action of one direction, with the rank that runs it."""
    head_f, head_i, head_w = _heads(stream, count)
    tail_f, tail_i, tail_w = _tails(stream, count)
    for s, rank in enumerate(stream.ranks):
        forward, prepare = stream.forward[s], stream.prepare[s]
        inputs, weight = stream.inputs[s], stream.weight[s]
        for k in range(count):
            yield rank, _Job(head_f[s][k], forward, tail_f[s][k], Op.F)
            if prepare:
                yield rank, _Job(head_f[s][k] + forward, prepare, inputs + tail_i[s][k], Op.R)
            yield rank, _Job(head_i[s][k], inputs, tail_i[s][k], Op.I)
            yield rank, _Job(head_w[s][k], weight, tail_w[s][k], Op.W)


def _heads(stream: _Stream, count: int) -> tuple[list[list[float]], ...]:
    """The earliest starts of F, I and W, by stage and micro-batch of the stream."""
    stages = range(len(stream.ranks))
    last = stages[-1]
    hop = stream.hop
    head_f, head_i, head_w = (_table(count, stages) for _ in range(3))
    # Of each stage: when the W of its rank's stages up to it can have ended, ascending.
    freed: list[list[float]] = [[] for _ in stages]
    limited = min(stream.cap) < float("inf")
    for k in range(count):
        for s in stages:
            forward = stream.forward
            head_f[s][k] = max(
                head_f[s - 1][k] + forward[s - 1] + hop[s - 1] if s else 0.0,
                head_f[s][k - 1] + forward[s] if k else 0.0,
                _room_at(stream, s, k, freed[s]) if limited else 0.0,
            )
        for s in reversed(stages):
            forward_s, inputs = stream.forward[s], stream.inputs[s]
            ready = forward_s + stream.prepare[s]
            head_i[s][k] = max(
                head_f[s][k] + ready,
                0.0 if s == last else head_i[s + 1][k] + stream.inputs[s + 1] + hop[s],
                head_i[s][k - 1] + inputs if k else 0.0,
                head_f[s][0] + (k + 1) * ready + k * inputs,
            )
            head_w[s][k] = max(
                head_i[s][k] + inputs, head_w[s][k - 1] + stream.weight[s] if k else 0.0
            )
        if limited:
            for s in stages:
                for lane in stream.lanes[s]:
                    insort(freed[s], head_w[lane][k] + stream.weight[lane])
    return head_f, head_i, head_w


def _room_at(stream: _Stream, stage: int, k: int, freed: Sequence[float]) -> float:
    """When the W before can have freed what the k-th micro-batch of a stage takes.

    Its rank has then begun the micro-batches up to k on this stage and on those before it; none
    of the W of k itself can have ended.
    """
    excess = (k + 1) * stream.shared[stage] - stream.cap[stage]
    if excess <= 0:
        return 0.0
    # Rounding down is safe, and the cap is already widened for the rounding of sums.
    needed = -int(-excess // stream.largest[stage])
    return freed[needed - 1] if 0 < needed <= len(freed) else 0.0


def _tails(stream: _Stream, count: int) -> tuple[list[list[float]], ...]:
    """The least times from the ends of F, I and W to the end of the step."""
    stages = range(len(stream.ranks))
    last = stages[-1]
    hop, forward, inputs = stream.hop, stream.forward, stream.inputs
    tail_f, tail_i, tail_w = (_table(count, stages) for _ in range(3))
    for k in reversed(range(count)):
        later = count - 1 - k
        for s in stages:
            weight, room = stream.weight[s], stream.room[s]
            waits = room is not None and 0 < room <= later
            tail_w[s][k] = max(
                later * weight, forward[s] + tail_f[s][k + (room or 0)] if waits else 0.0
            )
            tail_i[s][k] = max(
                hop[s - 1] + inputs[s - 1] + tail_i[s - 1][k] if s else 0.0,
                inputs[s] + tail_i[s][k + 1] if later else 0.0,
                later * inputs[s] + (later + 1) * weight,
                weight + tail_w[s][k],
            )
        for s in reversed(stages):
            back = stream.prepare[s] + inputs[s]
            tail_f[s][k] = max(
                back + tail_i[s][k],
                0.0 if s == last else hop[s] + forward[s + 1] + tail_f[s + 1][k],
                forward[s] + tail_f[s][k + 1] if later else 0.0,
                later * forward[s] + (later + 1) * (back + stream.weight[s]),
            )
    return tail_f, tail_i, tail_w


def _in_any_order(
    jobs: Sequence[_Job], *, cap: float, kept: Sequence[float], tail: float
) -> list[_Job]:
    """The jobs of a rank with its F in the order of their heads, each after the W it needs.

    The longest F come first and nothing follows them, so that no real order can do more by any
    moment.
    """
    if not min(kept):
        return list(jobs)
    forward = [job for job in jobs if job.op is Op.F]
    heads = sorted(job.head for job in forward)
    durations = sorted((job.duration for job in forward), reverse=True)
    freed = sorted(job.head + job.duration for job in jobs if job.op is Op.W)
    relaxed = [job for job in jobs if job.op is not Op.F]
    for index, (head, duration) in enumerate(zip(heads, durations, strict=True)):
        excess = (index + 1) * min(kept) - cap * (1 + 1e-9)
        needed = max(0, -int(-excess // max(kept)))
        ready = freed[needed - 1] if 0 < needed <= len(freed) else 0.0
        relaxed.append(_Job(max(head, ready), duration, tail, Op.F))
    return relaxed


def _table(count: int, stages: range) -> list[list[float]]:
    return [[0.0] * count for _ in stages]


def _preemptive(jobs: Sequence[_Job]) -> float:
    """Jackson's rule: at each moment the available job with the longest tail runs."""
    coming = sorted(jobs)
    available: list[tuple[float, float]] = []  # (-tail, what is left)
    now = bound = 0.0
    index = 0
    while index < len(coming) or available:
        if not available:
            now = max(now, coming[index].head)
        while index < len(coming) and coming[index].head <= now:
            heapq.heappush(available, (-coming[index].tail, coming[index].duration))
            index += 1
        negative_tail, left = heapq.heappop(available)
        until = coming[index].head if index < len(coming) else float("inf")
        if now + left <= until:
            now += left
            bound = max(bound, now - negative_tail)
        else:
            heapq.heappush(available, (negative_tail, left - (until - now)))
            now = until
    return bound
