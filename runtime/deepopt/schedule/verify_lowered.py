"""Are lowered lists right? Sends match receives in order, and nothing waits for ever.

A channel is one (source, target, kind), as one NCCL communicator would be: it delivers in
order, whatever the tags say, and holds a bounded number of sends that nobody has received.
Compute order is `verify`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import RECEIVE_OPS, SEND_OPS, Action, Op, Schedule
from deepopt.schedule.lowering import Channel, Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFault:
    """The first thing that is wrong with the lowered lists.

    Args:
        rank: where.
        action: the bad action.
        message: action and reason, in one sentence.
    """

    rank: int
    action: Action
    message: str


def verify_lowered(
    schedule: Schedule, *, rows: Sequence[Sequence[Action]], buffers: int = 1
) -> None:
    """Refuse lowered lists that lose a tensor or may wait for ever.

    Args:
        schedule: what the lists were made from.
        rows: compute, send, receive and reduce actions per rank.
        buffers: sends under way per channel before the next one waits; at least 1.

    Raises:
        ScheduleError: names the first bad action and the rule it breaks.
    """
    if (fault := find_transfer_fault(schedule, rows=rows, buffers=buffers)) is not None:
        raise ScheduleError(fault.message)


def find_transfer_fault(
    schedule: Schedule, *, rows: Sequence[Sequence[Action]], buffers: int
) -> TransferFault | None:
    """The first fault of lowered lists; None when they are right.

    Args:
        schedule: what the lists were made from.
        rows: compute, send, receive and reduce actions per rank.
        buffers: as for `verify_lowered`.
    """
    assert buffers >= 1, f"a channel holds at least one send, got {buffers}"
    routes = Routes(schedule)
    return (
        _beside_compute(schedule, routes, rows)
        or _fifo(routes, rows)
        or _reductions(schedule, rows)
        or _progress(routes, rows, buffers)
    )


def _beside_compute(
    schedule: Schedule, routes: Routes, rows: Sequence[Sequence[Action]]
) -> TransferFault | None:
    """A tensor is received before it is used, and made before it is sent."""
    for rank, row in enumerate(rows):
        seen: set[Action] = set()
        for action in row:
            if action.op is not Op.REDUCE and schedule.rank_of(action) != rank:
                return _fault(rank, action, f"belongs to rank {schedule.rank_of(action)}")
            stage, microbatch = action.stage, action.microbatch
            if action.op in SEND_OPS:
                makers = (Op.F,) if action.op is Op.SEND_F else (Op.I, Op.B)
                if not any(Action(stage, op, microbatch) in seen for op in makers):
                    return _fault(rank, action, "is sent before it is made")
            elif (receive := routes.input_of(action)) is not None and receive not in seen:
                return _fault(rank, action, f"runs before {receive}")
            seen.add(action)
    return None


def _fifo(routes: Routes, rows: Sequence[Sequence[Action]]) -> TransferFault | None:
    """What a channel carries is received in the order in which it was sent."""
    sends: dict[Channel, list[Action]] = {}
    receives: dict[Channel, list[Action]] = {}
    for row in rows:
        for action in row:
            if action.op in SEND_OPS or action.op in RECEIVE_OPS:
                channel = routes.channel(action)
                side = sends if action.op in SEND_OPS else receives
                side.setdefault(channel, []).append(action)
    for channel in sends.keys() | receives.keys():
        sent, received = sends.get(channel, []), receives.get(channel, [])
        for send, receive in zip(sent, received, strict=False):
            if routes.message(send) != routes.message(receive):
                return _fault(
                    channel.target,
                    receive,
                    f"meets {send}, the next tensor that rank {channel.source} sends on this "
                    "channel: sends and receives differ in order",
                )
        if len(sent) > len(received):
            extra = sent[len(received)]
            return _fault(channel.source, extra, f"is never received by rank {channel.target}")
        if len(received) > len(sent):
            extra = received[len(sent)]
            return _fault(channel.target, extra, f"is never sent by rank {channel.source}")
    return None


def _reductions(schedule: Schedule, rows: Sequence[Sequence[Action]]) -> TransferFault | None:
    """If any stage is reduced, each held stage is, once, after its last gradient."""
    if not any(action.op is Op.REDUCE for row in rows for action in row):
        return None
    for rank, row in enumerate(rows):
        reduced: set[int] = set()
        for action in row:
            if action.op is Op.REDUCE:
                if action.stage in reduced:
                    return _fault(rank, action, "runs twice")
                reduced.add(action.stage)
            elif action.op in (Op.W, Op.B) and action.stage in reduced:
                return _fault(rank, action, f"runs after {Action(action.stage, Op.REDUCE)}")
        for stage in schedule.placement.stages_of(rank):
            if stage not in reduced:
                return _fault(rank, Action(stage, Op.REDUCE), "is missing")
    return None


def _progress(
    routes: Routes, rows: Sequence[Sequence[Action]], buffers: int
) -> TransferFault | None:
    """Run the lists with a bounded number of sends per channel and receives posted in turn."""
    at = [0] * len(rows)
    sent: dict[Channel, int] = {}
    received: dict[Channel, int] = {}
    runnable = set(range(len(rows)))
    while runnable:
        rank = runnable.pop()
        row = rows[rank]
        while at[rank] < len(row):
            action = row[at[rank]]
            if action.op in SEND_OPS:
                channel = routes.channel(action)
                if sent.get(channel, 0) - received.get(channel, 0) >= buffers:
                    break
                sent[channel] = sent.get(channel, 0) + 1
                runnable.add(channel.target)
            elif action.op in RECEIVE_OPS:
                channel = routes.channel(action)
                if sent.get(channel, 0) <= received.get(channel, 0):
                    break
                received[channel] = received.get(channel, 0) + 1
                runnable.add(channel.source)
            at[rank] += 1
    stuck = [rank for rank, row in enumerate(rows) if at[rank] < len(row)]
    if not stuck:
        return None
    heads = ", ".join(f"{rows[rank][at[rank]]} on rank {rank}" for rank in stuck)
    return TransferFault(
        rank=stuck[0],
        action=rows[stuck[0]][at[stuck[0]]],
        message=f"deadlock with {buffers} send(s) under way per channel: {heads} wait for "
        "each other",
    )


def _fault(rank: int, action: Action, problem: str) -> TransferFault:
    return TransferFault(rank=rank, action=action, message=f"rank {rank}: {action} {problem}")
