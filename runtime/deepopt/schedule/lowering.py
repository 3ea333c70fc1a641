"""From compute actions to what an executor runs: with explicit sends, receives and reductions.

Pure. It does not look at time: a receive stands directly before its consumer, and the executor
posts receives ahead of their turn by its own lookahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from deepopt.schedule.ir import RECEIVE_OPS, SEND_OPS, Action, Direction, Op, Schedule

Lowered = tuple[tuple[Action, ...], ...]
"""Compute, send, receive and reduce actions per rank."""


class Channel(NamedTuple):
    """A one-way route whose messages keep their order: one communicator under NCCL.

    Args:
        source: sending rank.
        target: receiving rank.
        kind: Op.SEND_F for activations, Op.SEND_B for gradients.
    """

    source: int
    target: int
    kind: Op


class Message(NamedTuple):
    """One tensor in flight: what it is, independent of who sends it.

    Args:
        stage: the stage that made it.
        kind: Op.SEND_F for its output, Op.SEND_B for the gradient of its input.
        microbatch: index of the micro-batch.
    """

    stage: int
    kind: Op
    microbatch: int


def lower(schedule: Schedule, *, reduce: bool) -> Lowered:
    """Add sends, receives and reductions to a schedule.

    A `SEND_F` or `SEND_B` stands right after the action that made the tensor and carries the
    stage that made it; a `RECV_F` or `RECV_B` carries the stage that needs it, and stands
    directly before its consumer. It stands earlier in two cases: when another tensor of the
    same channel is sent later but needed sooner, so that channels that ignore tags deliver in
    order; and when the sender could otherwise wait for ever with one send under way per
    channel. Nothing is sent inside a rank.

    Args:
        schedule: compute actions; see `verify` for its rules.
        reduce: add one REDUCE per held stage, after the last gradient of that stage on the
            rank and after the REDUCE of every later stage there. So all ranks that hold the
            same stages start to exchange them in one order, which channels that ignore tags
            need. They reach it at different times: it has to start an exchange, not to wait.
    """
    sent = _sent_order(schedule)
    rows = [
        _lower_rank(schedule, rank=rank, sent=sent, reduce=reduce)
        for rank in range(schedule.placement.num_ranks)
    ]
    _receive_early_where_senders_wait(schedule, rows)
    return tuple(map(tuple, rows))


def count_transfers(schedule: Schedule) -> int:
    """Tensors that are sent between ranks in a step: the sends that `lower` adds.

    Args:
        schedule: compute actions.
    """
    return sum(_output_of(schedule, a) is not None for row in schedule.actions for a in row)


def channel_of(schedule: Schedule, action: Action) -> tuple[Channel, Message]:
    """The channel and the message of a send or receive action.

    Args:
        schedule: gives placement and directions.
        action: a SEND_ or RECV_ action.
    """
    assert action.microbatch is not None, f"{action} has no micro-batch"
    direction = schedule.directions[action.microbatch]
    if action.op in SEND_OPS:
        maker, kind = action.stage, action.op
    else:
        assert action.op in RECEIVE_OPS, f"{action} is neither a send nor a receive"
        forward = action.op is Op.RECV_F
        maker = action.stage - 1 if forward else action.stage + 1
        kind = Op.SEND_F if forward else Op.SEND_B
    user = maker + 1 if kind is Op.SEND_F else maker - 1
    channel = Channel(
        schedule.placement.rank_of(maker, direction),
        schedule.placement.rank_of(user, direction),
        kind,
    )
    return channel, Message(maker, kind, action.microbatch)


def _input_of(schedule: Schedule, action: Action) -> Action | None:
    """The receive that an action needs; None when its input is on its own rank."""
    assert action.microbatch is not None, f"{action} has no micro-batch"
    direction = schedule.directions[action.microbatch]
    if action.op is Op.F and action.stage > 0:
        other, op = action.stage - 1, Op.RECV_F
    elif action.op in (Op.I, Op.B) and action.stage < schedule.placement.num_stages - 1:
        other, op = action.stage + 1, Op.RECV_B
    else:
        return None
    rank_of = schedule.placement.rank_of
    if rank_of(other, direction) == rank_of(action.stage, direction):
        return None
    return Action(action.stage, op, action.microbatch)


def _output_of(schedule: Schedule, action: Action) -> Action | None:
    """The send that follows an action; None when its user is on its own rank."""
    assert action.microbatch is not None, f"{action} has no micro-batch"
    direction: Direction = schedule.directions[action.microbatch]
    if action.op is Op.F and action.stage < schedule.placement.num_stages - 1:
        other, op = action.stage + 1, Op.SEND_F
    elif action.op in (Op.I, Op.B) and action.stage > 0:
        other, op = action.stage - 1, Op.SEND_B
    else:
        return None
    rank_of = schedule.placement.rank_of
    if rank_of(other, direction) == rank_of(action.stage, direction):
        return None
    return Action(action.stage, op, action.microbatch)


def _sent_order(schedule: Schedule) -> dict[Channel, dict[Message, int]]:
    """Position of each message in its channel."""
    sent: dict[Channel, dict[Message, int]] = {}
    for row in schedule.actions:
        for action in row:
            if (send := _output_of(schedule, action)) is not None:
                channel, message = channel_of(schedule, send)
                order = sent.setdefault(channel, {})
                order[message] = len(order)
    return sent


def _lower_rank(
    schedule: Schedule,
    *,
    rank: int,
    sent: Mapping[Channel, Mapping[Message, int]],
    reduce: bool,
) -> list[Action]:
    row = schedule.actions[rank]
    receives = _receives_before(schedule, row, sent)
    # A copy that saw no micro-batch still takes part in its stage's sum.
    last_gradient = dict.fromkeys(schedule.placement.stages_of(rank), -1)
    for index, action in enumerate(row):
        if action.op in (Op.W, Op.B):
            last_gradient[action.stage] = index
    reductions: dict[int, list[Action]] = {}
    latest = -1
    for stage in sorted(last_gradient, reverse=True):
        latest = max(latest, last_gradient[stage])
        reductions.setdefault(latest, []).append(Action(stage, Op.REDUCE))

    def actions() -> Iterator[Action]:
        for index, action in enumerate(row):
            yield from receives.get(index, ())
            yield action
            if (send := _output_of(schedule, action)) is not None:
                yield send
            if reduce:
                yield from reductions.get(index, ())

    early = reductions.get(-1, []) if reduce else []
    return [*early, *actions()]


def _receives_before(
    schedule: Schedule,
    row: tuple[Action, ...],
    sent: Mapping[Channel, Mapping[Message, int]],
) -> dict[int, list[Action]]:
    """Receives by the index of the action that they stand before, in channel order."""
    by_channel: dict[Channel, list[tuple[int, int, Action]]] = {}
    for index, action in enumerate(row):
        if (receive := _input_of(schedule, action)) is not None:
            channel, message = channel_of(schedule, receive)
            place_in_channel = sent.get(channel, {}).get(message, len(row))
            by_channel.setdefault(channel, []).append((place_in_channel, index, receive))
    before: dict[int, list[Action]] = {}
    for entries in by_channel.values():
        earliest = len(row)
        placed: list[tuple[int, Action]] = []
        for _, index, receive in sorted(entries, reverse=True):
            earliest = min(earliest, index)
            placed.append((earliest, receive))
        for index, receive in reversed(placed):
            before.setdefault(index, []).append(receive)
    return before


def _receive_early_where_senders_wait(schedule: Schedule, rows: list[list[Action]]) -> None:
    """Move receives forward, in place, until one send under way per channel is enough.

    The lists are run against each other; where all stand still and a rank waits to send, the
    tensor that fills its channel is received by the target at once. Where they stop does not
    depend on the order in which ranks are run, so the result is a function of the schedule.
    """
    at = [0] * len(rows)
    under_way: dict[Channel, Action] = {}
    runnable = list(range(len(rows)))
    while True:
        while runnable:
            rank = runnable.pop()
            row = rows[rank]
            while at[rank] < len(row):
                action = row[at[rank]]
                if action.op in SEND_OPS:
                    channel, _ = channel_of(schedule, action)
                    if channel in under_way:
                        break
                    under_way[channel] = action
                    runnable.append(channel.target)
                elif action.op in RECEIVE_OPS:
                    channel, _ = channel_of(schedule, action)
                    if under_way.pop(channel, None) is None:
                        break
                    runnable.append(channel.source)
                at[rank] += 1
        blocked = next(
            (
                channel_of(schedule, row[at[rank]])[0]
                for rank, row in enumerate(rows)
                if at[rank] < len(row) and row[at[rank]].op in SEND_OPS
            ),
            None,
        )
        if blocked is None:
            return  # all lists ended, or the compute order itself is at fault: see `verify`
        row, start = rows[blocked.target], at[blocked.target]
        index = next(
            (
                i
                for i in range(start, len(row))
                if row[i].op in RECEIVE_OPS and channel_of(schedule, row[i])[0] == blocked
            ),
            None,
        )
        if index is None:
            return  # sent but never received, because an action is missing: see `verify`
        row.insert(start, row.pop(index))
        runnable.append(blocked.target)
