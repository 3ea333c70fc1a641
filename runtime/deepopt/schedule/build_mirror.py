"""The bi-stream order on mirror placement: micro-batches enter the pipeline from both ends.

Two 1F1B streams, one down and one up, are merged by the list scheduler. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.schedule.compact import Row, compact_rows
from deepopt.schedule.ir import Direction, Op, Placement
from deepopt.schedule.list_scheduler import (
    ListRules,
    Prefer,
    fuse_first_stage,
    list_schedule,
)

# F : I : W of a transformer layer as measured. Orders built in these costs lose little where I
# and W cannot be told apart; orders built in equal costs are better in equal costs alone, and
# fall behind 1F1B where W is no op of its own.
_TIME = {Op.F: 20.0, Op.I: 22.0, Op.W: 16.0, Op.B: 38.0}
_WEIGHT_BACKLOG = 2  # the best of none, 2 and 3 over p = 2..8, m = 4..32 and five cost ratios


def bi_stream(placement: Placement, directions: Sequence[Direction]) -> tuple[Row, ...]:
    """Two 1F1B streams merged by the list scheduler, for any number of ranks.

    Each stream keeps 1F1B's cap of p - stage micro-batches in flight, so a rank holds at most
    p + 1. A forward goes first, of the stream that has started fewer; then the oldest gradient;
    W fills the gaps. With an odd number of ranks the middle one holds one copy of its stage and
    serves both streams.

    Source: the bidirectional idea of arXiv:2107.06925 and of deepseek-ai/DualPipe; the merge is
    ours, and needs neither even p, nor even m, nor m >= 2p.

    Args:
        placement: mirror.
        directions: direction of each micro-batch; one stream may be empty.
    """
    rules = ListRules(
        duration=lambda stage, op, rank: _TIME.get(op, 0.0),
        cap=lambda stage, direction: placement.num_stages - stage,
        split=True,
        forward=Prefer.FEWEST,
        forward_first=True,
        weight_backlog=_WEIGHT_BACKLOG,
    )
    order = fuse_first_stage(list_schedule(placement, directions=directions, rules=rules))
    return compact_rows(order, num_microbatches=len(directions))
