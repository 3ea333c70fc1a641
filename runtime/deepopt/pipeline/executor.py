"""The one executor: interprets a rank's list of actions. It holds no schedule and no policy of
its own.

The list is bound once to stages, channels and message numbers, so that a step only calls one
function after the other. Receives are posted ahead in the order of the list; sends return at once;
every action leaves a span. A step may be begun before the one before is known to be right: its
first forwards run ahead (`schedule.run_ahead`), and are then continued or forgotten.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from deepopt.errors import TrainingError
from deepopt.pipeline.reduction import Bucket, Reducer, sum_terms
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Stage, Tensors
from deepopt.pipeline.transport import Channel, Kind, PendingReceive, TensorSpec, Transport
from deepopt.schedule.ir import RECEIVE_OPS, SEND_OPS, Action, Direction, Op, Placement
from deepopt.schedule.run_ahead import RunAhead


class Batches(Protocol):
    """Where the first and the last stage take their tensors from."""

    def batch(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one global micro-batch."""
        ...


class Executor:
    """Runs one replica's part of a step on one worker.

    Args:
        program: this worker's lowered actions; micro-batches count within the replica.
        ahead: what of them may run before the step before is known to be right.
        placement: stages on the pipeline ranks of the replica.
        directions: direction of each micro-batch of the replica.
        stages: the stages this worker holds, by index.
        buckets: gradient bucket of each stage it holds.
        transport: to the other workers.
        reducer: sums the buckets.
        batches: inputs and targets; None where neither the first nor the last stage is held.
        first_rank: world rank of pipeline rank 0 of this replica.
        first_microbatch: global index of the replica's micro-batch 0.
        lookahead: receives posted ahead of the one that is waited for.
        spans: takes the times.
        on_whole: called with a stage whose gradients are whole in row 0 without any exchange.
        before_action: called with (step, action) before each action; the fault script hooks in
            here.
    """

    def __init__(
        self,
        program: Sequence[Action],
        *,
        ahead: RunAhead,
        placement: Placement,
        directions: Sequence[Direction],
        stages: Mapping[int, Stage],
        buckets: Mapping[int, Bucket],
        transport: Transport,
        reducer: Reducer,
        batches: Batches | None,
        first_rank: int,
        first_microbatch: int,
        lookahead: int,
        spans: SpanRecorder,
        on_whole: Callable[[int], None],
        before_action: Callable[[int, Action], None] | None = None,
    ) -> None:
        self.program = tuple(program)
        self.action: Action | None = None  # in work; read by the heartbeat thread
        self.progress = 0  # actions done; read by the heartbeat thread
        self._ahead = ahead
        self._placement = placement
        self._directions = directions
        self._stages = stages
        self._buckets = buckets
        self._transport = transport
        self._reducer = reducer
        self._batches = batches
        self._first_rank = first_rank
        self._first_microbatch = first_microbatch
        self._lookahead = lookahead
        self._spans = spans
        self._on_whole = on_whole
        self._before_action = before_action
        self._last_stage = placement.num_stages - 1
        self._step = 0
        self._is_ahead = False  # the step in work was begun by run_ahead
        self._receives = [a for a in self.program if a.op in RECEIVE_OPS]
        self._num_posted = 0
        self._num_received = 0
        self._num_postable = len(self._receives)
        self._posted: deque[PendingReceive] = deque()  # in the order of the list
        self._early: dict[Action, PendingReceive] = {}  # whose turn came before their need
        self._specs: dict[tuple[Op, int], tuple[TensorSpec, ...]] = {}
        # By (F or B, stage, micro-batch): what arrived for it, what leaves it.
        self._arrived: dict[tuple[Op, int, int], Tensors] = {}
        self._departing: dict[tuple[Op, int, int], Tensors] = {}
        self._published: set[int] = set()
        self._addresses = {
            action: (self._channel(action), self._message(action))
            for action in self.program
            if action.op in RECEIVE_OPS or action.op in SEND_OPS
        }
        bind = {
            Op.F: self._bind_forward,
            Op.B: self._bind_backward,
            Op.I: self._bind_backward,
            Op.W: self._bind_weight,
            Op.R: self._bind_prepare,
            Op.SEND_F: self._bind_send_forward,
            Op.SEND_B: self._bind_send_backward,
            Op.RECV_F: self._bind_receive,
            Op.RECV_B: self._bind_receive,
            Op.REDUCE: self._bind_reduce,
        }
        # A receive that stands early, for the sake of its channel's order, is posted where it
        # stands and waited for where it is needed: nothing is to be idle before that.
        self._calls: list[tuple[Action, Callable[[], None]]] = []
        self._end_ahead = 0  # of what may run ahead, in self._calls
        late = late_waits(self.program)
        taken_early = {receive for receives in late.values() for receive in receives}
        for index, action in enumerate(self.program):
            for receive in late.get(index, ()):
                self._calls.append((receive, self._bind_late_wait(receive)))
            call = self._bind_early_receive if action in taken_early else bind[action.op]
            self._calls.append((action, call(action)))
            if index + 1 == ahead.num_actions:
                self._end_ahead = len(self._calls)

    def channels(self) -> list[Channel]:
        """The channels this worker's program uses."""
        return list(dict.fromkeys(channel for channel, _ in self._addresses.values()))

    def run_step(self, step: int) -> None:
        """Run the whole program once, or what is left of it; the exchange of gradients is
        started when it returns.

        Args:
            step: 1-based.
        """
        first = self._end_ahead if self._is_ahead else 0
        if not self._is_ahead:
            self._begin(step)
        assert self._step == step, f"step {self._step} was begun, step {step} is to be run"
        self._is_ahead = False
        for stage in self._stages.values():
            stage.gradients.zero()  # what ran ahead has left those of the step before alone
        self._num_postable = len(self._receives)
        self._post_receives()
        self._run(first, len(self._calls))

    def run_ahead(self, step: int) -> None:
        """Run the first forwards of a step; gradients of the step before stay as they are.

        Args:
            step: 1-based; the one that `run_step` or `abandon` gets next.
        """
        self._begin(step)
        self._is_ahead = True
        first_actions = self.program[: self._ahead.num_actions]
        self._num_postable = sum(action.op in RECEIVE_OPS for action in first_actions)
        self._post_receives()
        self._run(0, self._end_ahead)

    def abandon(self) -> None:
        """Forget what ran ahead: activations here, and what peers have sent or will send of it."""
        if not self._is_ahead:
            return
        self._is_ahead = False
        assert not self._posted, f"{len(self._posted)} receives are still under way"
        for action in self._ahead.arriving[self._num_received :]:
            self._post(action).wait()
        for pending in self._early.values():
            pending.wait()
        self._early.clear()
        self._arrived.clear()
        self._departing.clear()
        for stage in self._stages.values():
            stage.abandon()

    def _begin(self, step: int) -> None:
        self._step = step
        self._num_posted = self._num_received = 0
        for stage in self._stages.values():
            stage.begin_step(step)

    def _run(self, first: int, end: int) -> None:
        spans, before_action, step = self._spans, self._before_action, self._step
        for action, call in self._calls[first:end]:
            self.action = action
            if before_action is not None:
                before_action(step, action)
            spans.begin()
            call()
            spans.end(action)
            self.progress += 1
        self.action = None

    # One method an operation: binds it to what it works on. -------------------------------------

    def _bind_forward(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        stage, number = self._stages[index], self._global(microbatch)
        first, last = index == 0, index == self._last_stage
        here = (Op.F, index, microbatch)
        stays = not last and self._stays(index, index + 1, microbatch)
        batches = self._batches
        assert batches is not None or not (first or last), f"{action} without batches"

        def run() -> None:
            inputs: Tensors = () if first else self._arrived.pop(here)
            targets = None
            if batches is not None and (first or last):
                batch_inputs, targets = batches.batch(self._step, number)
                inputs = (batch_inputs,) if first else inputs
            outputs = stage.forward(number, inputs, targets)
            if last:
                return
            if (Op.B, index) not in self._specs:
                wanted = tuple(TensorSpec.of(out) for out in outputs if out.requires_grad)
                self._specs[Op.B, index] = wanted
            if stays:
                self._arrived[Op.F, index + 1, microbatch] = outputs
            else:
                self._departing[here] = outputs

        return run

    def _bind_backward(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        stage, number = self._stages[index], self._global(microbatch)
        backward = stage.backward if action.op is Op.B else stage.backward_input
        here, first = (Op.B, index, microbatch), index == 0
        stays = not first and self._stays(index, index - 1, microbatch)

        def run() -> None:
            grads = backward(number, self._arrived.pop(here, ()))
            if first:
                return
            if stays:
                self._arrived[Op.B, index - 1, microbatch] = grads
            else:
                self._departing[here] = grads

        return run

    def _bind_weight(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        return partial(self._stages[index].backward_weight, self._global(microbatch))

    def _bind_prepare(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        return partial(self._stages[index].prepare, self._global(microbatch))

    def _bind_send_forward(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        channel, message = self._addresses[action]
        here = (Op.F, index, microbatch)

        def run() -> None:
            outputs = self._departing.pop(here)
            if index not in self._published:
                specs = tuple(TensorSpec.of(out) for out in outputs)
                self._transport.publish(f"activation/{index + 1}", specs)
                self._specs[Op.SEND_F, index] = specs
                self._published.add(index)
            _check_shapes(action, outputs, self._specs[Op.SEND_F, index])
            self._transport.send(channel, message, outputs)

        return run

    def _bind_send_backward(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        channel, message = self._addresses[action]
        here = (Op.B, index, microbatch)
        return lambda: self._transport.send(channel, message, self._departing.pop(here))

    def _bind_receive(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        forward = action.op is Op.RECV_F
        here = (Op.F if forward else Op.B, index, microbatch)

        def run() -> None:
            tensors = self._next_receive().wait()
            self._num_received += 1
            if forward:
                self._ask_for_gradients(tensors, index)
            self._arrived[here] = tensors
            self._post_receives()

        return run

    def _bind_early_receive(self, action: Action) -> Callable[[], None]:
        def run() -> None:
            self._early[action] = self._next_receive()
            self._num_received += 1
            self._post_receives()

        return run

    def _bind_late_wait(self, action: Action) -> Callable[[], None]:
        index, microbatch = _stage_and_microbatch(action)
        forward = action.op is Op.RECV_F
        here = (Op.F if forward else Op.B, index, microbatch)

        def run() -> None:
            tensors = self._early.pop(action).wait()
            if forward:
                self._ask_for_gradients(tensors, index)
            self._arrived[here] = tensors

        return run

    def _ask_for_gradients(self, tensors: Tensors, stage: int) -> None:
        """Mark those tensors that arrived for a stage whose gradients go back."""
        for tensor, spec in zip(tensors, self._specs[Op.F, stage], strict=True):
            tensor.requires_grad_(spec.requires_grad)

    def _bind_reduce(self, action: Action) -> Callable[[], None]:
        bucket = self._buckets[action.stage]
        if len(bucket.holders) > 1:
            return partial(self._reducer.start, bucket)

        def run() -> None:
            sum_terms(bucket)
            self._on_whole(action.stage)

        return run

    # Receives, addresses. ----------------------------------------------------------------------

    def _next_receive(self) -> PendingReceive:
        """The next receive of the list, posted now if its shape was not known when its turn
        came."""
        if self._posted:
            return self._posted.popleft()
        self._num_posted += 1
        return self._post(self._receives[self._num_posted - 1])

    def _post_receives(self) -> None:
        """Post the next receives of the list, up to one whose shape nobody has told yet."""
        end = min(self._num_postable, self._num_received + self._lookahead)
        while self._num_posted < end:
            action = self._receives[self._num_posted]
            if _spec_key(action) not in self._specs:
                return
            self._posted.append(self._post(action))
            self._num_posted += 1

    def _post(self, action: Action) -> PendingReceive:
        """Post one receive; waits for its shape if nobody has told it yet."""
        key = _spec_key(action)
        if key not in self._specs:
            self._specs[key] = self._transport.look_up(f"activation/{action.stage}")
        channel, message = self._addresses[action]
        return self._transport.receive(channel, message, self._specs[key])

    def _channel(self, action: Action) -> Channel:
        stage, microbatch = _stage_and_microbatch(action)
        here = self._first_rank + self._rank_of(stage, microbatch)
        step = {Op.SEND_F: 1, Op.RECV_F: -1, Op.SEND_B: -1, Op.RECV_B: 1}[action.op]
        there = self._first_rank + self._rank_of(stage + step, microbatch)
        kind = Kind.ACTIVATION if action.op in (Op.SEND_F, Op.RECV_F) else Kind.GRADIENT
        if action.op in RECEIVE_OPS:
            return Channel(kind, there, here)
        return Channel(kind, here, there)

    def _message(self, action: Action) -> int:
        """Number of the message: the same at both ends."""
        stage, microbatch = _stage_and_microbatch(action)
        offset = {Op.SEND_F: 1, Op.RECV_F: 0, Op.SEND_B: -1, Op.RECV_B: 0}[action.op]
        return (stage + offset) * len(self._directions) + microbatch

    def _stays(self, stage: int, other: int, microbatch: int) -> bool:
        """Whether another stage of a micro-batch lies on the same rank."""
        return self._rank_of(stage, microbatch) == self._rank_of(other, microbatch)

    def _rank_of(self, stage: int, microbatch: int) -> int:
        return self._placement.rank_of(stage, self._directions[microbatch])

    def _global(self, microbatch: int) -> int:
        return self._first_microbatch + microbatch


def late_waits(program: Sequence[Action]) -> dict[int, list[Action]]:
    """Receives that do not stand right before their need, by the index of the action they serve.

    Args:
        program: lowered actions of a rank.
    """
    late: dict[int, list[Action]] = {}
    taken: dict[tuple[bool, int, int | None], Action] = {}  # received, not needed yet
    just_taken: set[Action] = set()  # since the last action that is no receive
    for index, action in enumerate(program):
        if action.op in RECEIVE_OPS:
            taken[action.op is Op.RECV_F, action.stage, action.microbatch] = action
            just_taken.add(action)
            continue
        if action.op in (Op.F, Op.I, Op.B):
            receive = taken.pop((action.op is Op.F, action.stage, action.microbatch), None)
            if receive is not None and receive not in just_taken:
                late.setdefault(index, []).append(receive)
        just_taken.clear()
    return late


def _stage_and_microbatch(action: Action) -> tuple[int, int]:
    assert action.microbatch is not None, f"{action} has no micro-batch"
    return action.stage, action.microbatch


def _spec_key(action: Action) -> tuple[Op, int]:
    return (Op.F if action.op is Op.RECV_F else Op.B, action.stage)


def _check_shapes(action: Action, tensors: Tensors, specs: Sequence[TensorSpec]) -> None:
    same = len(tensors) == len(specs) and all(
        t.shape == s.shape and t.dtype == s.dtype and t.requires_grad == s.requires_grad
        for t, s in zip(tensors, specs, strict=True)
    )
    if not same:
        found = tuple(TensorSpec.of(t) for t in tensors)
        raise TrainingError(
            f"{action}: the output of stage {action.stage} changed from {_text(specs)} "
            f"to {_text(found)} between micro-batches",
            remedy="pad micro-batches to one shape: stages exchange tensors of fixed shapes",
        )


def _text(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{list(s.shape)} {str(s.dtype).removeprefix('torch.')}" for s in specs)
