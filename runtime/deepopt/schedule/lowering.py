"""From compute actions to what an executor runs: with explicit sends, receives and reductions.

Pure. It does not look at time: a receive stands directly before its consumer, and the executor
posts receives ahead of their turn by its own lookahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from deepopt.schedule.ir import RECEIVE_OPS, SEND_OPS, Action, Op, Schedule

_MAKER = {Op.SEND_F: 0, Op.SEND_B: 0, Op.RECV_F: -1, Op.RECV_B: 1}
"""From the stage of an action to the one that made its tensor."""
_SENT_BY = {Op.RECV_F: Op.SEND_F, Op.RECV_B: Op.SEND_B}
_RECEIVES = {Op.F: Op.RECV_F, Op.I: Op.RECV_B, Op.B: Op.RECV_B}
_SENDS = {Op.F: Op.SEND_F, Op.I: Op.SEND_B, Op.B: Op.SEND_B}

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
    routes = Routes(schedule)
    sent = _sent_order(schedule, routes)
    rows = [
        _lower_rank(schedule, routes, rank=rank, sent=sent, reduce=reduce)
        for rank in range(schedule.placement.num_ranks)
    ]
    _receive_early_where_senders_wait(routes, rows)
    return tuple(map(tuple, rows))


def count_transfers(schedule: Schedule) -> int:
    """Tensors that are sent between ranks in a step: the sends that `lower` adds.

    Args:
        schedule: compute actions.
    """
    output_of = Routes(schedule).output_of
    return sum(output_of(action) is not None for row in schedule.actions for action in row)


class Routes:
    """The channels and messages of a schedule's sends and receives.

    Made once for many questions: a schedule of 64 ranks has hundreds of thousands of transfers.

    Args:
        schedule: gives placement and directions.
    """

    def __init__(self, schedule: Schedule) -> None:
        placement = schedule.placement
        by_direction = {
            direction: _channels(
                [placement.rank_of(stage, direction) for stage in range(placement.num_stages)]
            )
            for direction in dict.fromkeys(schedule.directions)
        }
        # By op, micro-batch and the action's stage; micro-batches of one direction share a list.
        self._channels = {
            op: [by_direction[direction][op] for direction in schedule.directions]
            for op in _MAKER
        }

    def channel(self, action: Action) -> Channel:
        """The channel of a send or receive action."""
        assert action.microbatch is not None, f"{action} has no micro-batch"
        channel = self._channels[action.op][action.microbatch][action.stage]
        assert channel is not None, f"{action} has no stage at its other end"
        return channel

    def message(self, action: Action) -> Message:
        """What a send or receive action carries."""
        assert action.microbatch is not None, f"{action} has no micro-batch"
        kind = action.op if action.op in SEND_OPS else _SENT_BY[action.op]
        return Message(action.stage + _MAKER[action.op], kind, action.microbatch)

    def input_of(self, action: Action) -> Action | None:
        """The receive that an action needs; None when its input is on its own rank."""
        return self._transfer(action, _RECEIVES.get(action.op))

    def output_of(self, action: Action) -> Action | None:
        """The send that follows an action; None when its user is on its own rank."""
        return self._transfer(action, _SENDS.get(action.op))

    def _transfer(self, action: Action, op: Op | None) -> Action | None:
        if op is None:
            return None
        assert action.microbatch is not None, f"{action} has no micro-batch"
        channel = self._channels[op][action.microbatch][action.stage]
        if channel is None or channel.source == channel.target:
            return None
        return Action(action.stage, op, action.microbatch)


def _channels(rank_of: Sequence[int]) -> dict[Op, list[Channel | None]]:
    """The channel of each send and receive by its stage; None where the chain of stages ends."""
    last = len(rank_of) - 1
    found: dict[Op, list[Channel | None]] = {}
    for op, to_maker in _MAKER.items():
        kind = _SENT_BY.get(op, op)
        to_user = to_maker + (1 if kind is Op.SEND_F else -1)
        found[op] = [
            Channel(rank_of[stage + to_maker], rank_of[stage + to_user], kind)
            if 0 <= stage + to_maker <= last and 0 <= stage + to_user <= last
            else None
            for stage in range(last + 1)
        ]
    return found


def _sent_order(schedule: Schedule, routes: Routes) -> dict[Channel, dict[Message, int]]:
    """Position of each message in its channel."""
    sent: dict[Channel, dict[Message, int]] = {}
    for row in schedule.actions:
        for action in row:
            if (send := routes.output_of(action)) is not None:
                order = sent.setdefault(routes.channel(send), {})
                order[routes.message(send)] = len(order)
    return sent


def _lower_rank(
    schedule: Schedule,
    routes: Routes,
    *,
    rank: int,
    sent: Mapping[Channel, Mapping[Message, int]],
    reduce: bool,
) -> list[Action]:
    row = schedule.actions[rank]
    receives = _receives_before(routes, row, sent)
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
            if (send := routes.output_of(action)) is not None:
                yield send
            if reduce:
                yield from reductions.get(index, ())

    early = reductions.get(-1, []) if reduce else []
    return [*early, *actions()]


def _receives_before(
    routes: Routes,
    row: tuple[Action, ...],
    sent: Mapping[Channel, Mapping[Message, int]],
) -> dict[int, list[Action]]:
    """Receives by the index of the action that they stand before, in channel order."""
    by_channel: dict[Channel, list[tuple[int, int, Action]]] = {}
    for index, action in enumerate(row):
        if (receive := routes.input_of(action)) is not None:
            channel = routes.channel(receive)
            place_in_channel = sent.get(channel, {}).get(routes.message(receive), len(row))
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


def _receive_early_where_senders_wait(routes: Routes, rows: list[list[Action]]) -> None:
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
                    channel = routes.channel(action)
                    if channel in under_way:
                        break
                    under_way[channel] = action
                    runnable.append(channel.target)
                elif action.op in RECEIVE_OPS:
                    channel = routes.channel(action)
                    if under_way.pop(channel, None) is None:
                        break
                    runnable.append(channel.source)
                at[rank] += 1
        blocked = next(
            (
                routes.channel(row[at[rank]])
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
                if row[i].op in RECEIVE_OPS and routes.channel(row[i]) == blocked
            ),
            None,
        )
        if index is None:
            return  # sent but never received, because an action is missing: see `verify`
        row.insert(start, row.pop(index))
        runnable.append(blocked.target)
