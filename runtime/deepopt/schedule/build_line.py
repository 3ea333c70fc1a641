"""Orders for a line of ranks: GPipe, 1F1B, interleaved 1F1B, ZB-H1 and ZB-H2.

Pure functions from (placement, directions) to the actions of every rank; no verification.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.schedule.ir import Action, Direction, Op, Placement
from deepopt.schedule.list_scheduler import Order, keep_microbatches


def gpipe(placement: Placement, directions: Sequence[Direction]) -> Order:
    """All forwards, then all backwards; micro-batches ascend in both.

    Source: arXiv:1811.06965.

    Args:
        placement: line or v; a rank runs its stages one after the other.
        directions: direction of each micro-batch.
    """
    microbatches = range(len(directions))
    rows = []
    for rank in range(placement.num_ranks):
        stages = placement.stages_of(rank)
        forward = [Action(s, Op.F, m) for s in stages for m in microbatches]
        backward = [Action(s, Op.B, m) for s in reversed(stages) for m in microbatches]
        rows.append((*forward, *backward))
    return tuple(rows)


def one_f_one_b(placement: Placement, directions: Sequence[Direction]) -> Order:
    """Rank r runs p - r - 1 forwards, then one forward and one backward in turn.

    Source: arXiv:2006.09503 (PipeDream-flush).

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    num_microbatches = len(directions)
    rows = []
    for rank in range(placement.num_ranks):
        warm_up = min(num_microbatches, placement.num_ranks - rank - 1)
        row = [Action(rank, Op.F, m) for m in range(warm_up)]
        for m in range(warm_up, num_microbatches):
            row += Action(rank, Op.F, m), Action(rank, Op.B, m - warm_up)
        row += [
            Action(rank, Op.B, m) for m in range(num_microbatches - warm_up, num_microbatches)
        ]
        rows.append(tuple(row))
    return tuple(rows)


def interleaved_one_f_one_b(placement: Placement, directions: Sequence[Direction]) -> Order:
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
    rounds = range(-(-len(directions) // num_ranks))
    rows = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        forward, backward = (
            [
                Action(stage, op, start * num_ranks + offset)
                for start in rounds
                for stage in order
                for offset in range(num_ranks)
            ]
            for op, order in ((Op.F, stages), (Op.B, stages[::-1]))
        )
        warm_up = min(len(forward), 2 * (num_ranks - rank - 1) + (per_rank - 1) * num_ranks)
        row = forward[:warm_up]
        for f, b in zip(forward[warm_up:], backward, strict=False):
            row += f, b
        row += backward[len(forward) - warm_up :]
        rows.append(row)
    return keep_microbatches(rows, len(directions))


def zb_h1(placement: Placement, directions: Sequence[Direction]) -> Order:
    """1F1B with rank r's weight gradients r micro-batches late: bubble (p-1)(F+I-W).

    No more activations than 1F1B: p on every rank.

    Source: arXiv:2401.10241, section 2 (written there with B for our I).

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    return _zero_bubble(placement, num_microbatches=len(directions), depth=1)


def zb_h2(placement: Placement, directions: Sequence[Direction]) -> Order:
    """ZB-H1 with twice the warm-up and delay: bubble (p-1)(F+I-2W) on each rank's own span.

    Activations of 2p - 1 micro-batches. Every rank works without a gap when F = I = W, but
    ranks start and end one after the other, which only pays where steps overlap.

    Source: arXiv:2401.10241, section 2.

    Args:
        placement: line with one stage per rank.
        directions: direction of each micro-batch.
    """
    return _zero_bubble(placement, num_microbatches=len(directions), depth=2)


def _zero_bubble(placement: Placement, *, num_microbatches: int, depth: int) -> Order:
    rows = []
    for rank in range(placement.num_ranks):
        warm_up = min(num_microbatches, depth * (placement.num_ranks - rank - 1))
        delay = depth * rank
        row = [Action(rank, Op.F, m) for m in range(warm_up)]
        for m in range(num_microbatches):
            if warm_up + m < num_microbatches:
                row.append(Action(rank, Op.F, warm_up + m))
            row.append(Action(rank, Op.I, m))
            if m >= delay:
                row.append(Action(rank, Op.W, m - delay))
        late = range(max(0, num_microbatches - delay), num_microbatches)
        rows.append((*row, *(Action(rank, Op.W, m) for m in late)))
    return tuple(rows)
