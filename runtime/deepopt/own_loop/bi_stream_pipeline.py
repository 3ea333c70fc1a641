"""`BiStreamPipeline`: a model as a bi-stream pipeline over processes that a script has started.

It runs forwards and backwards and leaves gradients; losses, optimizers and data are the script's. The
order of the separate passes is one program, "all forwards, then all backwards", which the executor
stops in between as it stops a step that runs ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from deepopt.convert import DeepModel, convert_to_deepopt
from deepopt.convert.loss import default_loss
from deepopt.convert.structure import leaves
from deepopt.errors import InputError
from deepopt.moe.elb_router import ElbRouter
from deepopt.own_loop.given_group import GivenGroupTransport
from deepopt.own_loop.held_layers import (
    check_copies,
    held_layers,
    held_parameters,
    held_state,
    make_plan,
    trainable_parameters,
)
from deepopt.own_loop.open_stage import OpenStage
from deepopt.own_loop.pass_sums import PassSums
from deepopt.own_loop.splitting import GivenBatch, Tensors, cut, join
from deepopt.pipeline.executor import Executor
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Loss, Stage
from deepopt.pipeline.stage_build import make_stage
from deepopt.pipeline.transport import Transport
from deepopt.planner.orders import built_order
from deepopt.schedule.ir import Schedule
from deepopt.schedule.lowering import lower
from deepopt.schedule.run_ahead import run_ahead
from deepopt.schedule.two_passes import two_passes

_LOOKAHEAD = 2  # as pipeline.receive_lookahead of a job


class BiStreamPipeline:
    """A model over the processes of the default process group, each with a stage and its mirror image.

    Stage s lies on rank s for the first half of the micro-batches, which enter at rank 0 and end at
    the last rank, and on rank `stages - 1 - s` for the second half, which go the other way. With n x
    `stages` processes there are n replicas of that, each of consecutive ranks and with samples of its own;
    "the first rank", "the batch" are a replica's then. All ranks make it, and call its methods, in one order,
    as they would call collectives. Without a process group, or with one process, all stages are here as one,
    with the same bits at the same `groups`.

    Args:
        model: any module, with the same weights on all ranks, or what `convert_to_deepopt` gave. Its
            modules are used as they are, so `model` trains; layers of other ranks do not change here.
        stages: how many, or the index of the first layer of each.
        microbatches: into how many parts a batch is cut; None: 2 x stages.
        groups: runs of micro-batches of all replicas, one after the other, whose gradients add up apart and
            are then added in order; None: one for each direction of each replica.
        example_inputs: of one micro-batch, for a module whose layers must be recorded.
        device: where the held layers are put; None: where they are.
        defer_weights: let weight gradients of `step` wait for gaps, in layers where a trial in the first
            pass finds the same bits and a gain; the `nn.Linear`s of those become a subclass of it.
        seed: of random numbers in the layers (dropout), which depend on it, the number of the pass, the
            micro-batch and the layer alone.

    Raises:
        InputError: the processes do not fit the stages, weights differ between ranks, or the model
            cannot be cut.
    """

    def __init__(
        self,
        model: torch.nn.Module | DeepModel,
        stages: int | Sequence[int],
        *,
        microbatches: int | None = None,
        groups: int | None = None,
        example_inputs: Any = None,
        device: torch.device | str | None = None,
        defer_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, DeepModel):
            model = convert_to_deepopt(model, example_inputs=example_inputs)
        if microbatches is None:
            microbatches = 2 * (stages if isinstance(stages, int) else len(stages))
        grouped = dist.is_available() and dist.is_initialized()
        world_size = dist.get_world_size() if grouped else 1
        plan = make_plan(
            model,
            stages=stages,
            microbatches=microbatches,
            world_size=world_size,
            groups=groups,
        )
        self._plan, self._chain = plan, model.chain
        self._rank = dist.get_rank() if world_size > 1 else 0
        self._replica = self._rank // plan.pipeline_size
        self._own_loss = getattr(model.model, "loss", None)
        self._has_routers = any(isinstance(m, ElbRouter) for m in model.model.modules())
        first = next((p for p in model.model.parameters()), torch.empty(0))
        self._device = torch.device(first.device if device is None else device)
        held = plan.held_stages(self._rank)
        self._indices = [i for stage in held for i in plan.stage_layers(stage)]
        for index in self._indices:
            model.chain.layers[index].module.to(self._device)
        layers = held_layers(model.chain, indices=self._indices)
        self._held = held_parameters(model.chain, indices=self._indices)
        trainable = trainable_parameters(model.chain, plan)
        self._transport: Transport = (
            GivenGroupTransport(device=self._device) if world_size > 1 else LoneTransport()
        )
        check_copies(
            plan, rank=self._rank, layers=layers, trainable=trainable, wire=self._transport
        )

        self._given = GivenBatch(first=plan.replica_groups(self._replica)[0][0])
        self._stages = {
            index: make_stage(
                index,
                plan=plan,
                rank=self._rank,
                layers=layers,
                trainable=trainable,
                seed=seed,
                device=self._device,
                defer_weights=defer_weights,
                kind=OpenStage if index == plan.num_stages - 1 else Stage,
            )
            for index in held
        }
        last = self._stages.get(plan.num_stages - 1)
        self._last = last if isinstance(last, OpenStage) else None
        self._sums = PassSums(
            self._stages,
            plan=plan,
            rank=self._rank,
            trainable=trainable,
            transport=self._transport,
        )
        self._spans = SpanRecorder(self._device)
        placement, directions = plan.make_placement(), plan.directions(self._replica)
        self._two_passes = self._make_executor(
            two_passes(placement, directions=directions), shapes="two-passes"
        )
        self._whole_step = self._make_executor(
            built_order(plan, data_index=self._replica), shapes="step"
        )
        self._transport.open(
            dict.fromkeys(
                (
                    *self._two_passes.channels(),
                    *self._whole_step.channels(),
                    *self._sums.channels(),
                )
            )
        )
        self._pass = 0
        self._outputs: Tensors | None = None  # of the forward pass that waits for its backward

    def forward_pass(self, inputs: Any = None) -> Any:
        """Run a batch forward, from both ends, and keep what a backward needs.

        One that no `backward_pass` followed is forgotten.

        Args:
            inputs: of the whole batch, samples first: a tensor, a tuple of the model's arguments, or a
                dict of them in the order of `example_inputs`. The first and the last rank give the same;
                others may give none.

        Returns:
            The model's output of the samples that `output_slice` names, as leaves that take a gradient:
            on the last rank the first half of the batch, on the first rank the second half, in one process
            all of it. None on the others.

        Raises:
            InputError: the batch is missing, or does not divide into micro-batches.
            TransportError: a peer is gone.
        """
        self._give(inputs)
        self._pass += 1
        self._two_passes.abandon()
        self._outputs = None
        with self._passing():
            self._two_passes.run_ahead(self._pass)
            self._transport.finish_sends()
        self._spans.take()
        if self._last is None:
            self._outputs = ()
            return None
        parts = [self._last.outputs[m] for m in sorted(self._last.outputs)]
        self._last.outputs.clear()
        self._outputs = join(parts, samples=len(self._given.inputs[0][0]))
        return self._last.like_output(self._outputs)

    def backward_pass(self, grad_outputs: Any = None) -> None:
        """Run the last `forward_pass` backward and add the gradients to `.grad` of the held parameters.

        Those of all copies of a stage, and of all uses of a tied weight, are summed: they are the gradients
        of the batches of all replicas.

        Args:
            grad_outputs: for each tensor that `forward_pass` returned here, in its order or structure, the
                gradient of the loss of the batches of all replicas; None for a tensor without one.
                Nothing on ranks where it returned None.

        Raises:
            InputError: there was no `forward_pass`, or the gradients do not fit its outputs.
            TransportError: a peer is gone.
        """
        if self._outputs is None:
            raise InputError(
                "backward_pass without a forward_pass before it: its activations are used up",
                remedy="call forward_pass first; for gradients of several batches, in turn",
            )
        self._take_grads(grad_outputs)
        self._outputs = None
        with self._passing(), self._adding_gradients():
            self._two_passes.run_step(self._pass)

    def step(
        self,
        inputs: Any = None,
        targets: torch.Tensor | None = None,
        *,
        loss_fn: Loss | None = None,
    ) -> float:
        """Forward and backward of a batch in the bi-stream order: backwards run beside forwards, which
        the separate passes cannot have. Adds the gradients to `.grad`; updates nothing.

        Args:
            inputs: as for `forward_pass`.
            targets: of the whole batch; on the first and the last rank.
            loss_fn: maps (output, targets) of a micro-batch to a scalar mean; None: the model's own `loss`,
                what it returned as `loss`, or cross-entropy.

        Returns:
            The mean of the losses of all micro-batches of all replicas, on every rank.

        Raises:
            InputError: the batch is missing, or does not divide into micro-batches.
            TransportError: a peer is gone.
        """
        self._give(inputs, targets, with_targets=True)
        self._pass += 1
        self._two_passes.abandon()
        self._outputs = None
        own = self._own_loss if callable(self._own_loss) else default_loss
        with ExitStack() as stack:
            stack.enter_context(self._passing())
            if self._last is not None:
                stack.enter_context(self._last.with_loss(loss_fn or own))
            stack.enter_context(self._adding_gradients())
            self._whole_step.run_step(self._pass)
        return self._mean_loss()

    def update_routers(self) -> None:
        """Move the biases of all `ElbRouter`s, alike on all ranks, by what passes with a backward have
        counted since the last call: once before each step of the optimizer. With `elb.compensate` the
        gradients of overloaded experts shrink here. A model without routers has nothing to move.

        Raises:
            TrainingError: scores were not finite; no bias was moved.
            TransportError: a peer is gone.
        """
        if not self._has_routers:
            return
        self._sums.update_routers(
            {
                held.use: torch.zeros_like(held.value)
                if held.value.grad is None
                else held.value.grad
                for held in self._held.values()
            }
        )

    def output_slice(self, num_samples: int) -> slice | None:
        """Which samples of a batch `forward_pass` returns the outputs of on this rank; None for none.

        Args:
            num_samples: of the batch; a multiple of `microbatches`.
        """
        here = self._output_microbatches()
        if not here:
            return None
        size = num_samples // self._num_microbatches
        return slice(here[0] * size, (here[-1] + 1) * size)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters of the layers on this rank, by their names in the model, each once."""
        for name, held in self._held.items():
            yield name, held.value

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of the layers on this rank: for an optimizer on each rank."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the layers on this rank, under their names in the model. Those of ranks
        0 to `(stages - 1) // 2` together are the model's."""
        return held_state(self._chain, indices=self._indices)

    # What a pass needs, and leaves.
    # -------------------------------------------------------------------------------------

    def _give(self, inputs: Any, targets: Any = None, *, with_targets: bool = False) -> None:
        """Cut the batch, where it is needed."""
        if self._last is None:  # neither end: the first stage lies where the last one does
            return
        count = self._num_microbatches
        if inputs is None or (with_targets and targets is None):
            missing = "inputs" if inputs is None else "targets"
            raise InputError(
                f"rank {self._rank} holds the first and the last stage, and was given no {missing}",
                remedy="give the whole batch on the first and on the last rank",
            )
        cut_inputs = cut(inputs, into=count, what="inputs")
        cut_targets = cut(targets, into=count, what="targets") if with_targets else []
        self._given.inputs, self._given.targets = cut_inputs, cut_targets

    def _take_grads(self, grad_outputs: Any) -> None:
        """Hand the last stage the gradients of its outputs, by micro-batch."""
        outputs, given = self._outputs, [] if grad_outputs is None else [*leaves(grad_outputs)]
        assert outputs is not None, "checked before"
        if len(given) != len(outputs):
            raise InputError(
                f"grad_outputs has {len(given)} gradients, forward_pass returned {len(outputs)} "
                f"tensors on rank {self._rank}",
                remedy="give one gradient for each tensor, in order; None for one without",
            )
        if self._last is None:
            return
        grads = []
        for number, (output, grad) in enumerate(zip(outputs, given, strict=True)):
            if grad is not None and (
                not isinstance(grad, torch.Tensor) or grad.shape != output.shape
            ):
                found = list(grad.shape) if isinstance(grad, torch.Tensor) else repr(grad)
                raise InputError(
                    f"grad_outputs[{number}] has shape {found}, the output {list(output.shape)}",
                    remedy="give the gradient of the loss with respect to what forward_pass returned",
                )
            if output.requires_grad:
                filled = torch.zeros_like(output) if grad is None else grad.detach()
                grads.append(filled.to(device=output.device, dtype=output.dtype))
        here = self._output_microbatches()
        chunks = [grad.chunk(len(here)) for grad in grads]
        for place, microbatch in enumerate(here):
            number = self._given.first + microbatch
            self._last.output_grads[number] = tuple(chunk[place] for chunk in chunks)

    @property
    def _num_microbatches(self) -> int:
        """Of this replica."""
        return self._plan.num_microbatches // self._plan.data_size

    def _output_microbatches(self) -> list[int]:
        """Micro-batches of this replica that end here."""
        placement, last = self._plan.make_placement(), self._plan.num_stages - 1
        return [
            microbatch
            for microbatch, direction in enumerate(self._plan.directions(self._replica))
            if placement.rank_of(last, direction) == self._rank % self._plan.pipeline_size
        ]

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """Leaves the script's random numbers alone; after an error nothing is in flight."""
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        except BaseException:
            self._two_passes.reset()
            self._whole_step.reset()
            self._sums.forget()
            self._spans.take()
            self._outputs = None
            raise

    @contextmanager
    def _adding_gradients(self) -> Iterator[None]:
        """Gradients of the pass inside are summed over copies and added to what was in `.grad`."""
        before = {name: held.value.grad for name, held in self._held.items()}
        found: dict[str, torch.Tensor] = {}
        try:
            yield
            found = self._sums.finish()
            self._transport.finish_sends()
            self._spans.take()
        finally:
            for stage in self._stages.values():
                stage.gradients.zero()
            for name, held in self._held.items():
                held.value.grad = before[name]
        with torch.no_grad():
            for held in self._held.values():
                total, parameter = found.get(held.use), held.value
                if total is None:
                    continue
                if parameter.grad is None:  # the rows of an exchange are used again
                    parameter.grad = total.to(parameter.dtype, copy=True)
                else:
                    parameter.grad.add_(total)

    def _mean_loss(self) -> float:
        losses = [0.0] * self._plan.num_microbatches
        if self._last is not None:
            for microbatch, loss in self._last.losses.items():
                losses[microbatch] = float(loss)
        rows = self._transport.start_all_gather(losses).wait()
        return math.fsum(map(math.fsum, zip(*rows, strict=True))) / len(losses)

    # Building.
    # ------------------------------------------------------------------------------------------

    def _make_executor(self, schedule: Schedule, *, shapes: str) -> Executor:
        rows = lower(schedule, reduce=True)
        pipeline_rank = self._rank % self._plan.pipeline_size
        return Executor(
            rows[pipeline_rank],
            ahead=run_ahead(schedule, rows)[pipeline_rank],
            placement=schedule.placement,
            directions=schedule.directions,
            stages=self._stages,
            buckets=self._sums.buckets,
            transport=self._transport,
            reducer=self._sums.reducer,
            batches=self._given if self._last is not None else None,
            first_rank=self._rank - pipeline_rank,
            first_microbatch=self._given.first,
            lookahead=_LOOKAHEAD,
            spans=self._spans,
            on_whole=lambda stage: None,
            shapes=shapes,
        )
