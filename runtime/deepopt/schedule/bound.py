"""A time that no schedule can beat: how good a found schedule is, without knowing the best.

Pure. The bound holds for every order of F, I and W (so for B too) on the given placement, with
any amount of memory; it does not say that an order of that length exists.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from deepopt.schedule.ir import Direction, Placement
from deepopt.schedule.simulate import CostTable


class _Job(NamedTuple):
    """One action seen from its rank: when it may start, how long it takes, what must follow."""

    head: float
    duration: float
    tail: float


def lower_bound_s(
    placement: Placement, *, directions: Sequence[Direction], costs: CostTable
) -> float:
    """The greatest, over all ranks, of the shortest preemptive plan of the rank's own work.

    Each action gets a head (chains of dependencies and of its predecessors on one stage) and a
    tail (the same, towards the end); one rank with heads and tails is solved exactly when
    actions may be interrupted, which bounds the case where they may not.

    Source: J. Carlier, "The one-machine sequencing problem", EJOR 11 (1982), the preemptive bound.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage and hop.
    """
    jobs: list[list[_Job]] = [[] for _ in range(placement.num_ranks)]
    for direction in Direction:
        count = sum(d is direction for d in directions)
        if count:
            for rank, job in _stream(placement, direction, count, costs):
                jobs[rank].append(job)
    bound = 0.0
    for rank, own in enumerate(jobs):
        factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
        update_s = (
            sum(costs.update_s[s] for s in placement.stages_of(rank)) * factor
            if costs.update_s
            else 0.0
        )
        work = sum(job.duration for job in own)
        first = min((job.head for job in own), default=0.0)
        bound = max(bound, _preemptive(own), first + work + update_s)
    return bound


def _stream(
    placement: Placement, direction: Direction, count: int, costs: CostTable
) -> Iterator[tuple[int, _Job]]:
    """Every action of one direction, with the rank that runs it."""
    stages = range(placement.num_stages)
    ranks = [placement.rank_of(stage, direction) for stage in stages]
    factors = [costs.rank_factor[rank] if costs.rank_factor else 1.0 for rank in ranks]
    forward = [costs.forward_s[s] * factors[s] for s in stages]
    inputs = [costs.input_s[s] * factors[s] for s in stages]
    weight = [costs.weight_s[s] * factors[s] for s in stages]
    hop = [costs.hop_between(a, target=b) for a, b in pairwise(ranks)]
    last = placement.num_stages - 1

    head_f = _table(count, stages)
    head_i = _table(count, stages)
    head_w = _table(count, stages)
    for k in range(count):
        for s in stages:
            head_f[s][k] = max(
                head_f[s - 1][k] + forward[s - 1] + hop[s - 1] if s else 0.0,
                head_f[s][k - 1] + forward[s] if k else 0.0,
            )
        for s in reversed(stages):
            head_i[s][k] = max(
                head_f[s][k] + forward[s]
                if s == last
                else head_i[s + 1][k] + inputs[s + 1] + hop[s],
                head_i[s][k - 1] + inputs[s] if k else 0.0,
                head_f[s][0] + (k + 1) * forward[s] + k * inputs[s],
            )
            head_w[s][k] = max(
                head_i[s][k] + inputs[s], head_w[s][k - 1] + weight[s] if k else 0.0
            )

    tail_i = _table(count, stages)
    tail_f = _table(count, stages)
    for k in reversed(range(count)):
        later = count - 1 - k
        for s in stages:
            tail_i[s][k] = max(
                hop[s - 1] + inputs[s - 1] + tail_i[s - 1][k] if s else 0.0,
                inputs[s] + tail_i[s][k + 1] if later else 0.0,
                later * inputs[s] + (later + 1) * weight[s],
            )
        for s in reversed(stages):
            tail_f[s][k] = max(
                inputs[s] + tail_i[s][k]
                if s == last
                else hop[s] + forward[s + 1] + tail_f[s + 1][k],
                forward[s] + tail_f[s][k + 1] if later else 0.0,
                later * forward[s] + (later + 1) * (inputs[s] + weight[s]),
            )

    for s in stages:
        for k in range(count):
            yield ranks[s], _Job(head_f[s][k], forward[s], tail_f[s][k])
            yield ranks[s], _Job(head_i[s][k], inputs[s], tail_i[s][k])
            yield ranks[s], _Job(head_w[s][k], weight[s], (count - 1 - k) * weight[s])


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
