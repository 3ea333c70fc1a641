"""A worker's receives of one step: posted ahead in the order of its list, waited for when needed.

The list says by when a receive must be posted, so that no sender waits for ever; it is waited for
directly before the action that uses it. What may be posted ahead of that is posted by `post_ahead`,
while the device computes: a receive costs a message to the sender, which nobody has to wait for.
It knows neither stages nor schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from deepopt.pipeline.transport import Channel, PendingReceive, TensorSpec, Transport
from deepopt.schedule.ir import Action, Op

SpecKey = tuple[Op, int]
"""(F or B, the stage that receives): all its micro-batches have one shape."""


def spec_key(action: Action) -> SpecKey:
    """Where the shapes of what a receive brings are kept.

    Args:
        action: RECV_F or RECV_B.
    """
    return (Op.F if action.op is Op.RECV_F else Op.B, action.stage)


class Receives:
    """The receives of one worker, step after step.

    Args:
        actions: in the order in which they are posted.
        addresses: channel and message number of each.
        specs: what is known of shapes; what is learnt is added.
        transport: to the senders.
        lookahead: receives posted ahead of the one that is waited for.
        shapes: as for the executor.
    """

    def __init__(
        self,
        actions: Sequence[Action],
        *,
        addresses: Mapping[Action, tuple[Channel, int]],
        specs: dict[SpecKey, tuple[TensorSpec, ...]],
        transport: Transport,
        lookahead: int,
        shapes: str,
    ) -> None:
        self._actions = actions
        # All else goes by an action's number: hashing actions would take longer than what is looked up.
        self._number = {action: number for number, action in enumerate(actions)}
        self._addresses = [(*addresses[action], spec_key(action)) for action in actions]
        self._specs = specs
        self._transport = transport
        self._lookahead = lookahead
        self._shapes = shapes
        self._limit = len(actions)
        self._num_posted = 0
        self._wanted = 0  # how many shall be posted by the end of the next computation
        self._pending: dict[int, PendingReceive] = {}
        self._taken: set[int] = set()

    def begin(self, *, limit: int | None = None) -> None:
        """Begin a step.

        Args:
            limit: post no more than the first so many until `lift_limit`; None for all.
        """
        assert not self._pending, f"{self._under_way()} were never waited for"
        self._num_posted = self._wanted = 0
        self._taken.clear()
        self._limit = len(self._actions) if limit is None else limit
        self._post_up_to(self._lookahead)

    def lift_limit(self) -> None:
        """Let all receives of the step be posted."""
        self._limit = len(self._actions)
        self._post_up_to(len(self._taken) + self._lookahead)

    def post_through(self, action: Action) -> None:
        """Post the receives of the list up to one, as far as their shapes are known."""
        self._post_up_to(self._number[action] + 1)

    def post_ahead(self) -> None:
        """Post what may be ahead of the receives that were taken."""
        if self._num_posted < self._wanted:
            self._post_up_to(self._wanted)

    def take(self, action: Action) -> tuple[torch.Tensor, ...]:
        """Wait for what a receive brings; the next ones are posted by `post_ahead`."""
        number = self._number[action]
        while self._num_posted <= number:  # the first step: wait for the shapes, too
            self._post(self._num_posted)
            self._num_posted += 1
        tensors = self._pending.pop(number).wait()
        self._taken.add(number)
        self._wanted = number + 1 + self._lookahead
        return tensors

    def drop(self, actions: Iterable[Action]) -> None:
        """Take in what senders have sent or will send, and forget it.

        Args:
            actions: in the order of the list; those that were taken already are left out.
        """
        for number in (self._number[action] for action in actions):
            if number in self._taken:
                continue
            if number not in self._pending:
                self._post(number)
            self._pending.pop(number).wait()
        assert not self._pending, f"{self._under_way()} are still under way"

    def forget(self) -> None:
        """Drop everything under way: the group that it came from has ended."""
        self._pending.clear()
        self._taken.clear()
        self._num_posted = self._wanted = 0

    def _post_up_to(self, end: int) -> None:
        """Post receives of the list, up to one whose shape nobody has told yet."""
        while self._num_posted < min(end, self._limit):
            if self._addresses[self._num_posted][2] not in self._specs:
                return
            self._post(self._num_posted)
            self._num_posted += 1

    def _post(self, number: int) -> None:
        """Post one receive; waits for its shape if nobody has told it yet."""
        channel, message, key = self._addresses[number]
        if key not in self._specs:
            stage = self._actions[number].stage
            self._specs[key] = self._transport.look_up(f"{self._shapes}/{stage}")
        self._pending[number] = self._transport.receive(channel, message, self._specs[key])

    def _under_way(self) -> list[str]:
        return [str(self._actions[number]) for number in self._pending]
