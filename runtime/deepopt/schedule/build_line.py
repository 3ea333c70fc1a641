"""Orders for one direction on a line of ranks: GPipe, 1F1B.

Pure functions from (placement, directions) to the actions of every rank; no verification.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.schedule.ir import Action, Direction, Op, Placement
from deepopt.schedule.list_scheduler import Order


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
