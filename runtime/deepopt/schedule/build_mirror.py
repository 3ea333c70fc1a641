"""The bi-stream order on mirror placement: micro-batches enter the pipeline from both ends.

Two 1F1B streams, one down and one up, are merged by the list scheduler. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.schedule.ir import Direction, Op, Placement
from deepopt.schedule.list_scheduler import ListRules, Order, fuse_first_stage, list_schedule

_UNIT_TIME = {Op.F: 1.0, Op.I: 1.0, Op.W: 1.0, Op.B: 2.0}


def bi_stream(placement: Placement, directions: Sequence[Direction]) -> Order:
    """Two 1F1B streams merged in unit costs (F = I = W = 1), any number of ranks.

    Each stream keeps 1F1B's cap of p - stage micro-batches in flight, so that a rank holds at
    most p + 1. Where two streams compete, a backward goes first; W fills the gaps. With an odd
    number of ranks the middle one holds one copy of its stage and serves both streams.

    Source: the bidirectional idea of arXiv:2107.06925 and of deepseek-ai/DualPipe; the merge is
    ours, and needs neither even p, nor even m, nor m >= 2p.

    Args:
        placement: mirror.
        directions: direction of each micro-batch; one stream may be empty.
    """
    rules = ListRules(
        duration=lambda stage, op, rank: _UNIT_TIME[op],
        cap=lambda stage, direction: placement.num_stages - stage,
        split=True,
    )
    return fuse_first_stage(list_schedule(placement, directions=directions, rules=rules))
