"""The one executor: interprets a rank's list of actions. It holds no schedule and no policy of
its own.

The list is bound once to stages, channels and message numbers, so that a step only calls one
function after the other. Receives are posted ahead in the order of the list; sends return at once;
every action leaves a span. A step may be begun before the one before is known to be right: its
first forwards run ahead (`schedule.run_ahead`), and are then continued or forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from deepopt.datasets.samples import Batch, model_inputs
from deepopt.errors import TrainingError
from deepopt.pipeline.receives import Receives, SpecKey
from deepopt.pipeline.reduction import Bucket, Reducer
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Stage, Tensors
from deepopt.pipeline.transport import Channel, Kind, TensorSpec, Transport
from deepopt.schedule.ir import (
    COMPUTE_OPS,
    RECEIVE_OPS,
    SEND_OPS,
    Action,
    Direction,
    Op,
    Placement,
)
from deepopt.schedule.run_ahead import RunAhead


class Batches(Protocol):
    """Where the first and the last stage take their tensors from."""

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets of one global micro-batch."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    """What is done for an action.

    Args:
        position: as in `Slot`.
        action: what the span says.
        run: does it.
        is_silent: leaves no span, because a later call for the same action does.
    """

    position: int
    action: Action
    run: Callable[[], None]
    is_silent: bool = False


class Slot(NamedTuple):
    """A turn of an action in the order of execution.

    Args:
        position: of the action in the program; of a wait, that of the action that it serves.
        action: what.
        only_post: of a receive that is waited for later.
    """

    position: int
    action: Action
    only_post: bool = False


def order_waits(program: Sequence[Action]) -> list[Slot]:
    """Put the wait for each receive directly before the action that uses it.

    Lowering has some receives earlier, so that no sender waits for ever: there they need only be
    posted, and other work goes on.

    Args:
        program: lowered actions of a rank.
    """
    receives = {_brings(action): action for action in program if action.op in RECEIVE_OPS}
    slots: list[Slot] = []
    in_a_row: list[Slot] = []  # receives since the last other action
    for position, action in enumerate(program):
        if action.op in RECEIVE_OPS:
            in_a_row.append(Slot(position, action, only_post=True))
            continue
        used = receives.get(_uses(action))
        slots += [slot for slot in in_a_row if slot.action != used]
        in_a_row.clear()
        if used is not None:
            slots.append(Slot(position, used))
        slots.append(Slot(position, action))
    return slots


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
        shapes: under which key stages tell each other the shapes of what they send.
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
        shapes: str = "activation",
    ) -> None:
        self.program = tuple(program)
        self.action: Action | None = None  # in work; read by the heartbeat thread
        self.action_began_s = 0.0  # on the monotonic clock; set before `action`
        self.progress = 0  # actions done; read by the heartbeat thread
        self._shapes = shapes
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
        self._spans = spans
        self._on_whole = on_whole
        self.before_action = before_action
        self._last_stage = placement.num_stages - 1
        self._step = 0
        self._is_ahead = False  # the step in work was begun by run_ahead
        self._specs: dict[SpecKey, tuple[TensorSpec, ...]] = {}
        # By (F or B, stage, micro-batch): what arrived for it, what leaves it.
        self._arrived: dict[tuple[Op, int, int], Tensors] = {}
        self._departing: dict[tuple[Op, int, int], Tensors] = {}
        self._published: set[int] = set()
        self._addresses = {
            action: (self._channel(action), self._message(action))
            for action in self.program
            if action.op in RECEIVE_OPS or action.op in SEND_OPS
        }
        self._receives = Receives(
            [action for action in self.program if action.op in RECEIVE_OPS],
            addresses=self._addresses,
            specs=self._specs,
            transport=transport,
            lookahead=lookahead,
            shapes=shapes,
        )
        self._calls = self._bind()
        self._num_calls_ahead = sum(call.position < ahead.num_actions for call in self._calls)

    @property
    def is_ahead(self) -> bool:
        """Whether the next step was begun by `run_ahead`."""
        return self._is_ahead

    def channels(self) -> list[Channel]:
        """The channels this worker's program uses."""
        return list(dict.fromkeys(channel for channel, _ in self._addresses.values()))

    def microbatches_read(self) -> list[int]:
        """Global micro-batches in the order in which a step asks `batches` for them, with repetitions."""
        ends = (0, self._last_stage)
        return [
            self._global(action.microbatch)
            for action in self.program
            if action.op is Op.F and action.stage in ends and action.microbatch is not None
        ]

    def run_step(self, step: int) -> None:
        """Run the whole program once, or what is left of it; the exchange of gradients is
        started when it returns.

        Args:
            step: 1-based.
        """
        first = self._num_calls_ahead if self._is_ahead else 0
        if self._is_ahead:
            assert self._step == step, f"step {self._step} was begun, step {step} is to be run"
            self._receives.lift_limit()
        else:
            self._begin(step)
            self._receives.begin()
        self._is_ahead = False
        for stage in self._stages.values():
            stage.gradients.zero()  # what ran ahead has left those of the step before alone
        self._run(first, len(self._calls))

    def run_ahead(self, step: int) -> None:
        """Run the first forwards of a step; gradients of the step before stay as they are.

        Args:
            step: 1-based; the one that `run_step` or `abandon` gets next.
        """
        self._begin(step)
        self._is_ahead = True
        first_actions = self.program[: self._ahead.num_actions]
        self._receives.begin(limit=sum(a.op in RECEIVE_OPS for a in first_actions))
        self._run(0, self._num_calls_ahead)

    def abandon(self) -> None:
        """Forget what ran ahead: activations here, and what peers have sent or will send of it."""
        if not self._is_ahead:
            return
        self._is_ahead = False
        self._receives.drop(self._ahead.arriving)
        self._arrived.clear()
        self._departing.clear()
        for stage in self._stages.values():
            stage.abandon()

    def reset(self) -> None:
        """Forget the step in work, without a word to peers: their group has ended.

        Shapes are known; they are told again to whoever is new in the next group.
        """
        self._is_ahead = False
        self.action = None
        self._receives.forget()
        self._arrived.clear()
        self._departing.clear()
        self._published.clear()
        for stage in self._stages.values():
            stage.abandon()

    def _begin(self, step: int) -> None:
        self._step = step
        for stage in self._stages.values():
            stage.begin_step(step)

    def _run(self, first: int, end: int) -> None:
        spans, before_action, step = self._spans, self.before_action, self._step
        for call in self._calls[first:end]:
            if call.is_silent:
                call.run()
                continue
            self.action_began_s = time.monotonic()
            self.action = action = call.action
            if before_action is not None:
                before_action(step, action)
            spans.begin()
            call.run()
            spans.end(action)
            self.progress += 1
        self.action = None

    # One method an operation: binds it to what it works on. -------------------------------------

    def _bind(self) -> list[_Call]:
        """The program as calls."""
        bind = {
            Op.F: self._bind_forward,
            Op.B: self._bind_backward,
            Op.I: self._bind_backward,
            Op.W: self._bind_weight,
            Op.R: self._bind_prepare,
            Op.SEND_F: self._bind_send_forward,
            Op.SEND_B: self._bind_send_backward,
            Op.REDUCE: self._bind_reduce,
        }
        calls = []
        for slot in order_waits(self.program):
            action = slot.action
            if slot.only_post:
                run: Callable[[], None] = partial(self._receives.post_through, action)
            elif action.op in RECEIVE_OPS:
                run = self._bind_receive(action)
            elif action.op in COMPUTE_OPS:
                run = self._posting_ahead(bind[action.op](action))
            else:
                run = bind[action.op](action)
            calls.append(_Call(slot.position, action, run, is_silent=slot.only_post))
        return calls

    def _posting_ahead(self, compute: Callable[[], None]) -> Callable[[], None]:
        """A computation, and what receives may be posted while the device is at it."""
        post_ahead = self._receives.post_ahead

        def run() -> None:
            compute()
            post_ahead()

        return run

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
                inputs = model_inputs(batch_inputs) if first else inputs
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
                specs = self._specs.setdefault(
                    (Op.SEND_F, index), tuple(TensorSpec.of(out) for out in outputs)
                )
                self._transport.publish(f"{self._shapes}/{index + 1}", specs)
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
            tensors = self._receives.take(action)
            if forward:
                for tensor, spec in zip(tensors, self._specs[Op.F, index], strict=True):
                    tensor.requires_grad_(spec.requires_grad)
            self._arrived[here] = tensors

        return run

    def _bind_reduce(self, action: Action) -> Callable[[], None]:
        bucket, gradients = self._buckets[action.stage], self._stages[action.stage].gradients
        exchanged = len(bucket.holders) > 1

        def run() -> None:
            gradients.finish()
            if exchanged:
                self._reducer.start(bucket)
            else:
                gradients.sum_groups()
                self._on_whole(action.stage)

        return run

    # Addresses. --------------------------------------------------------------------------------

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


def _stage_and_microbatch(action: Action) -> tuple[int, int]:
    assert action.microbatch is not None, f"{action} has no micro-batch"
    return action.stage, action.microbatch


def _brings(receive: Action) -> tuple[Op, int, int | None]:
    return (Op.F if receive.op is Op.RECV_F else Op.B, receive.stage, receive.microbatch)


def _uses(action: Action) -> tuple[Op, int, int | None]:
    """What an F, I or B needs to arrive; of other actions, what no receive brings."""
    backward = action.op is Op.I or action.op is Op.B
    return (Op.B if backward else action.op, action.stage, action.microbatch)


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
