"""Orders for a line of ranks: GPipe, 1F1B, interleaved 1F1B, ZB-H1, ZB-H2 and ZB-H3.

Pure functions from (placement, directions) to the rows of every rank, in codes; no verification.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deepopt.schedule.compact import Row, RowWriter, keep_microbatches
from deepopt.schedule.ir import Direction, Op, Placement


def gpipe(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """All forwards, then all backwards; micro-batches ascend in both.

    Source: arXiv:1811.06965.

    Args:
        placement: line or v; a rank runs its stages one after the other.
        directions: direction of each micro-batch.
    """
    count = len(directions)
    rows = []
    for rank in range(placement.num_ranks):
        writer = RowWriter(num_microbatches=count)
        stages = placement.stages_of(rank)
        for stage in stages:
            writer.add((stage, Op.F), times=count)
        for stage in reversed(stages):
            writer.add((stage, Op.B), times=count)
        rows.append(writer.row)
    return tuple(rows)


def one_f_one_b(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """Rank r runs p - r - 1 forwards, then one forward and one backward in turn.

    Source: arXiv:2006.09503 (PipeDream-flush).

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    count = len(directions)
    rows = []
    for rank in range(placement.num_ranks):
        writer = RowWriter(num_microbatches=count)
        warm_up = min(count, placement.num_ranks - rank - 1)
        writer.add((rank, Op.F), times=warm_up)
        writer.add((rank, Op.F), (rank, Op.B), times=count - warm_up)
        writer.add((rank, Op.B), times=warm_up)
        rows.append(writer.row)
    return tuple(rows)


def interleaved_one_f_one_b(
    placement: Placement, directions: Sequence[Direction]
) -> tuple[Row, ...]:
    """1F1B over v stages a rank, micro-batches in rounds of p through one stage after the
    other.

    Micro-batches that do not fill the last round are ordered as if it were full, and what is
    not there is left out; so any number of them works.

    Source: arXiv:2104.04473, section 2.2.

    Args:
        placement: line; with one stage per rank the result is 1F1B.
        directions: direction of each micro-batch.
    """
    num_ranks = placement.num_ranks
    per_rank = placement.num_stages // num_ranks
    if per_rank == 1:
        return one_f_one_b(placement, directions)
    rounds = -(-len(directions) // num_ranks)
    rows = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        forward, backward = (
            [(stage, op) for stage in order for _ in range(num_ranks)] * rounds
            for op, order in ((Op.F, stages), (Op.B, stages[::-1]))
        )
        warm_up = min(len(forward), 2 * (num_ranks - rank - 1) + (per_rank - 1) * num_ranks)
        writer = RowWriter(num_microbatches=rounds * num_ranks)
        writer.add(*forward[:warm_up])
        writer.add(*itertools.chain(*zip(forward[warm_up:], backward, strict=False)))
        writer.add(*backward[len(forward) - warm_up :])
        rows.append(writer.row)
    return keep_microbatches(rows, made_for=rounds * num_ranks, keep=len(directions))


def zb_h1(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """1F1B with rank r's weight gradients r micro-batches late: bubble (p-1)(F+I-W).

    No more activations than 1F1B: p on every rank.

    Source: arXiv:2401.10241, section 2 (written there with B for our I).

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    return _zero_bubble(placement, num_microbatches=len(directions), depth=1)


def zb_h2(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """ZB-H1 with twice the warm-up and delay: bubble (p-1)(F+I-2W) on each rank's own span.

    Activations of 2p - 1 micro-batches. Every rank works without a gap when F = I = W, but
    ranks start and end one after the other, which only pays where steps overlap.

    Source: arXiv:2401.10241, section 2.

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    return _zero_bubble(placement, num_microbatches=len(directions), depth=2)


def zb_h3(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """ZB-H1 with three times the warm-up and delay: links and unequal ops hide between steps.

    Activations of 3p - 2 micro-batches. Alone a step is no faster than with ZB-H2; where steps
    overlap, no rank waits as long as (p-1) hops and (p-1)(I-W) fit into (p-1) forwards.

    Source: ZB-H2 (arXiv:2401.10241, section 2) taken one further.

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    return _zero_bubble(placement, num_microbatches=len(directions), depth=3)


def _zero_bubble(placement: Placement, *, num_microbatches: int, depth: int) -> tuple[Row, ...]:
    rows = []
    for rank in range(placement.num_ranks):
        writer = RowWriter(num_microbatches=num_microbatches)
        forward, inputs, weight = (rank, Op.F), (rank, Op.I), (rank, Op.W)
        warm_up = min(num_microbatches, depth * (placement.num_ranks - rank - 1))
        # What each micro-batch's turn holds: an F until none is left, a W once `delay` have passed.
        last_f = num_microbatches - warm_up
        first_w = min(num_microbatches, depth * rank)
        writer.add(forward, times=warm_up)
        writer.add(forward, inputs, times=min(last_f, first_w))
        writer.add(inputs, times=first_w - last_f)
        writer.add(forward, inputs, weight, times=last_f - first_w)
        writer.add(inputs, weight, times=num_microbatches - max(last_f, first_w))
        writer.add(weight, times=first_w)
        rows.append(writer.row)
    return tuple(rows)
