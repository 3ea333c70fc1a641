"""How far each rank may run into the next step before the last one is known to be right.

A step ends with an exchange of gradient norms. Until its result is there, a rank may already do the
first forwards of the next step, with weights that it may have to take back. What it did then, its
peers must be able to forget: so all ranks stop at points that fit together, and each knows which
messages of the others it has to take in and drop. Pure; `pipeline.step` runs by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepopt.schedule.ir import RECEIVE_OPS, SEND_OPS, Action, Op, Schedule
from deepopt.schedule.lowering import Lowered, Routes

_FORWARD_OPS = frozenset({Op.F, Op.R, Op.SEND_F, Op.RECV_F})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAhead:
    """What one rank may do of a step before the step before it is known to be right.

    Args:
        num_actions: the first so many of its lowered actions.
        arriving: receives, in the order of its list, whose senders send them within their own
            first actions; those behind `num_actions` are taken in only to be dropped.
    """

    num_actions: int
    arriving: tuple[Action, ...]


def run_ahead(schedule: Schedule, rows: Lowered) -> tuple[RunAhead, ...]:
    """The longest beginnings of all ranks that hold forwards alone and need each other alone.

    Args:
        schedule: compute actions; gives placement and directions.
        rows: the same, lowered.

    Returns:
        By rank.
    """
    message = Routes(schedule).message
    ends = [_forwards(row) for row in rows]
    while True:
        sent = {
            message(action)
            for row, end in zip(rows, ends, strict=True)
            for action in row[:end]
            if action.op in SEND_OPS
        }
        shorter = [
            next(
                (
                    index
                    for index, action in enumerate(row[:end])
                    if action.op in RECEIVE_OPS and message(action) not in sent
                ),
                end,
            )
            for row, end in zip(rows, ends, strict=True)
        ]
        if shorter == ends:
            break
        ends = shorter
    return tuple(
        RunAhead(
            num_actions=end,
            arriving=tuple(
                action for action in row if action.op in RECEIVE_OPS and message(action) in sent
            ),
        )
        for row, end in zip(rows, ends, strict=True)
    )


def _forwards(row: tuple[Action, ...]) -> int:
    """How many actions stand before the first that is not part of a forward."""
    return next((i for i, action in enumerate(row) if action.op not in _FORWARD_OPS), len(row))
