"""The one executor: interprets a rank's list of actions. It holds no schedule and no policy of
its own.

Receives are posted ahead in the order of the list; sends return at once; every action leaves a
span.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from deepopt.errors import TrainingError
from deepopt.pipeline.reduction import Bucket, Reducer
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Stage, Tensors
from deepopt.pipeline.transport import Channel, Kind, PendingReceive, TensorSpec, Transport
from deepopt.schedule.ir import RECEIVE_OPS, Action, Direction, Op, Placement


class Batches(Protocol):
    """Where the first and the last stage take their tensors from."""

    def batch(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of one global micro-batch."""
        ...


class Executor:
    """Runs one replica's part of a step on one worker.

    Args:
        program: this worker's lowered actions; micro-batches count within the replica.
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
        before_action: called with (step, action) before each action; the fault script hooks in
            here.
    """

    def __init__(
        self,
        program: Sequence[Action],
        *,
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
        before_action: Callable[[int, Action], None] | None = None,
    ) -> None:
        self.program = tuple(program)
        self.action: Action | None = None  # in work; read by the heartbeat thread
        self.progress = 0  # actions done; read by the heartbeat thread
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
        self._before_action = before_action
        self._last_stage = placement.num_stages - 1
        self._step = 0
        self._receives = [a for a in self.program if a.op in RECEIVE_OPS]
        self._num_posted = 0
        self._num_received = 0
        self._posted: dict[Action, PendingReceive] = {}
        self._specs: dict[tuple[Op, int], tuple[TensorSpec, ...]] = {}
        self._arrived: dict[
            tuple[Op, int, int], Tensors
        ] = {}  # by (F or B, stage, micro-batch)
        self._departing: dict[tuple[Op, int, int], Tensors] = {}
        self._published: set[int] = set()
        self._run = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._backward_input,
            Op.W: self._backward_weight,
            Op.R: self._prepare,
            Op.SEND_F: self._send_forward,
            Op.SEND_B: self._send_backward,
            Op.RECV_F: self._receive,
            Op.RECV_B: self._receive,
            Op.REDUCE: self._reduce,
        }

    def channels(self) -> list[Channel]:
        """The channels this worker's program uses."""
        found = {
            self._channel(action): None
            for action in self.program
            if action.op in (Op.SEND_F, Op.SEND_B, Op.RECV_F, Op.RECV_B)
        }
        return list(found)

    def run_step(self, step: int) -> None:
        """Run the whole program once; gradients are summed when it returns.

        Args:
            step: 1-based.
        """
        self._step = step
        self._num_posted = self._num_received = 0
        for stage in self._stages.values():
            stage.begin_step(step)
        self._post_receives()
        for action in self.program:
            self.action = action
            if self._before_action is not None:
                self._before_action(step, action)
            self._spans.begin()
            self._run[action.op](action)
            self._spans.end(action)
            self.progress += 1
        self.action = None

    # One method an operation.
    # ------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        first, last = stage == 0, stage == self._last_stage
        inputs: Tensors = () if first else self._arrived.pop((Op.F, stage, microbatch))
        targets = None
        if first or last:
            assert self._batches is not None, f"{action} without batches"
            batch_inputs, targets = self._batches.batch(self._step, self._global(microbatch))
            inputs = (batch_inputs,) if first else inputs
        outputs = self._stages[stage].forward(self._global(microbatch), inputs, targets)
        if last:
            return
        if (Op.B, stage) not in self._specs:
            wanted = tuple(TensorSpec.of(out) for out in outputs if out.requires_grad)
            self._specs[Op.B, stage] = wanted
        if self._rank_of(stage + 1, microbatch) == self._rank_of(stage, microbatch):
            self._arrived[Op.F, stage + 1, microbatch] = outputs
        else:
            self._departing[Op.F, stage, microbatch] = outputs

    def _backward(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        grads = self._arrived.pop((Op.B, stage, microbatch), ())
        self._pass_back(action, self._stages[stage].backward(self._global(microbatch), grads))

    def _backward_input(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        grads = self._arrived.pop((Op.B, stage, microbatch), ())
        inner = self._stages[stage].backward_input(self._global(microbatch), grads)
        self._pass_back(action, inner)

    def _pass_back(self, action: Action, grads: Tensors) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        if stage == 0:
            return
        if self._rank_of(stage - 1, microbatch) == self._rank_of(stage, microbatch):
            self._arrived[Op.B, stage - 1, microbatch] = grads
        else:
            self._departing[Op.B, stage, microbatch] = grads

    def _backward_weight(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        self._stages[stage].backward_weight(self._global(microbatch))

    def _prepare(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        self._stages[stage].prepare(self._global(microbatch))

    def _send_forward(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        outputs = self._departing.pop((Op.F, stage, microbatch))
        if stage not in self._published:
            specs = tuple(TensorSpec.of(out) for out in outputs)
            self._transport.publish(f"activation/{stage + 1}", specs)
            self._specs[Op.SEND_F, stage] = specs
            self._published.add(stage)
        _check_shapes(action, outputs, self._specs[Op.SEND_F, stage])
        self._transport.send(self._channel(action), self._message(action), outputs)

    def _send_backward(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        grads = self._departing.pop((Op.B, stage, microbatch))
        self._transport.send(self._channel(action), self._message(action), grads)

    def _receive(self, action: Action) -> None:
        stage, microbatch = _stage_and_microbatch(action)
        if (
            action not in self._posted
        ):  # its shape was not known when its turn to be posted came
            self._post_receives(until=action)
        tensors = self._posted.pop(action).wait()
        self._num_received += 1
        if action.op is Op.RECV_F:
            specs = self._specs[Op.F, stage]
            for tensor, spec in zip(tensors, specs, strict=True):
                tensor.requires_grad_(spec.requires_grad)
            self._arrived[Op.F, stage, microbatch] = tensors
        else:
            self._arrived[Op.B, stage, microbatch] = tensors
        self._post_receives()

    def _reduce(self, action: Action) -> None:
        bucket = self._buckets[action.stage]
        if len(bucket.holders) > 1 or len(bucket.terms) > 1:
            self._reducer.start(bucket)

    # Receives, addresses. ----------------------------------------------------------------------

    def _post_receives(self, until: Action | None = None) -> None:
        """Post the next receives of the list, up to one whose shape nobody has told yet."""
        while self._num_posted < len(self._receives):
            action = self._receives[self._num_posted]
            if until is None and self._num_posted >= self._num_received + self._lookahead:
                return
            kind = Op.F if action.op is Op.RECV_F else Op.B
            specs = self._specs.get((kind, action.stage))
            if specs is None:
                if until is None:
                    return
                specs = self._transport.look_up(f"activation/{action.stage}")
                self._specs[kind, action.stage] = specs
            self._posted[action] = self._transport.receive(
                self._channel(action), self._message(action), specs
            )
            self._num_posted += 1
            if action == until:
                return

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

    def _rank_of(self, stage: int, microbatch: int) -> int:
        return self._placement.rank_of(stage, self._directions[microbatch])

    def _global(self, microbatch: int) -> int:
        return self._first_microbatch + microbatch


def _stage_and_microbatch(action: Action) -> tuple[int, int]:
    assert action.microbatch is not None, f"{action} has no micro-batch"
    return action.stage, action.microbatch


def _check_shapes(action: Action, tensors: Tensors, specs: Sequence[TensorSpec]) -> None:
    found = tuple(TensorSpec.of(t) for t in tensors)
    if found != tuple(specs):
        raise TrainingError(
            f"{action}: the output of stage {action.stage} changed from {_text(specs)} "
            f"to {_text(found)} between micro-batches",
            remedy="pad micro-batches to one shape: stages exchange tensors of fixed shapes",
        )


def _text(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{list(s.shape)} {str(s.dtype).removeprefix('torch.')}" for s in specs)
