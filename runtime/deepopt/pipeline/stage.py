"""A stage: a contiguous range of layers on one worker, and what it does with one micro-batch.

F, B, I, W and R are methods here. The stage knows its layers, loss and gradients; it does not
know ranks, schedules or transports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.randomness import mix, seed_generators
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue, defer_linears

Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of the chain on this worker.

    Args:
        index: position in the chain; part of the seed of its random numbers.
        name: fully qualified name.
        module: maps one tensor, or a tuple as its arguments, to one tensor or a tuple.
        parameters: its parameters by the names of the model's `state_dict`, each once.
        tied: own name -> name of the earlier layer's parameter it shares its values with.
        buffers: persistent buffers by the names of the model's `state_dict`.
    """

    index: int
    name: str
    module: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that take gradients."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


@dataclass(slots=True)
class _Segment:
    """A run of layers with one autograd graph; `outputs` is None until it has been run with
    gradients."""

    layers: Sequence[Layer]
    leaves: Tensors
    targets: torch.Tensor | None = None
    outputs: Tensors | None = None


@dataclass(frozen=True, slots=True)
class _Habits:
    """What only a run with gradients tells of a segment: which outputs require one, and whether
    it writes to its inputs."""

    requires_grad: tuple[bool, ...]
    writes_inputs: bool


class Stage:
    """The layers of one stage and its micro-batches in flight.

    Args:
        index: global stage index.
        layers: in chain order.
        gradients: where weight gradients add up.
        group_of: gradient group of each global micro-batch of this copy.
        seed: the job's seed.
        device: where the layers are.
        num_microbatches: micro-batches of one step over all replicas; each loss is divided by
            it.
        loss: makes the stage the last one; maps (output, targets) to a scalar mean.
        recompute: keep only layer inputs in F and run the layers again for the backward.
        defer_weights: compute weight gradients in W instead of with the input gradient.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[Layer],
        *,
        gradients: StageGradients,
        group_of: Mapping[int, int],
        seed: int,
        device: torch.device,
        num_microbatches: int,
        loss: Loss | None = None,
        recompute: bool = False,
        defer_weights: bool = False,
    ) -> None:
        self.index = index
        self.layers = tuple(layers)
        self.gradients = gradients
        self.losses: dict[int, torch.Tensor] = {}
        self._group_of = group_of
        self._seed = seed
        self._step = 0
        self._device = device
        self._num_microbatches = num_microbatches
        self._loss = loss
        self._recompute = recompute
        self._flights: dict[int, list[_Segment]] = {}
        self._habits: dict[int, _Habits] = {}  # of recomputed segments, by first layer
        self._queues: dict[int, WeightGradQueue] = {}
        self._holder = WeightGradHolder()
        for layer in self.layers:
            if defer_weights:
                defer_linears(layer.module, self._holder)
            for module in layer.module.modules():
                if hasattr(module, "loss_scale"):  # losses that a layer adds on its own
                    module.loss_scale = 1.0 / num_microbatches  # type: ignore[assignment]

    def begin_step(self, step: int) -> None:
        """Forget the last step's losses; its gradients stay until somebody zeroes them."""
        assert not self._flights, f"micro-batches {sorted(self._flights)} are still in flight"
        self._step = step
        self.losses.clear()

    def forward(
        self, microbatch: int, inputs: Tensors, targets: torch.Tensor | None = None
    ) -> Tensors:
        """F: run the layers.

        Args:
            microbatch: global index in the step.
            inputs: tensors that nobody else writes to, on any device; those that take a
                gradient say so.
            targets: for the last stage.

        Returns:
            The outputs, detached, `requires_grad` telling which need a gradient; empty for the
            last stage.
        """
        runs = [(layer,) for layer in self.layers] if self._recompute else [self.layers]
        flight = []
        values = tuple(t.to(self._device) for t in inputs)
        targets = None if targets is None else targets.to(self._device)
        for position, layers in enumerate(runs):
            ends = position == len(runs) - 1
            segment = _Segment(layers, _as_leaves(values), targets if ends else None)
            flight.append(segment)
            # The last layer and the loss are kept: their backward comes next, nothing would be
            # saved.
            if self._recompute and not (ends and self._loss is not None):
                values = self._run_without_graph(segment, microbatch)
            else:
                self._run(segment, microbatch)
                assert segment.outputs is not None, "a segment that ran has outputs"
                values = segment.outputs
        self._flights[microbatch] = flight
        if self._loss is not None:
            return ()
        return tuple(v.detach().requires_grad_(v.requires_grad) for v in values)

    def prepare(self, microbatch: int) -> None:
        """R: run again, with gradients, what F did not keep."""
        for segment in self._flights[microbatch]:
            if segment.outputs is None:
                self._run(segment, microbatch)

    def backward(self, microbatch: int, output_grads: Tensors = ()) -> Tensors:
        """B: gradients of the inputs and of the weights.

        Args:
            microbatch: global index in the step.
            output_grads: one for each output that requires a gradient; none for the last stage.

        Returns:
            Gradients of the inputs that require one, in their order.
        """
        self.gradients.aim(self._group_of[microbatch])
        grads: Sequence[torch.Tensor | None] = output_grads
        for segment in reversed(self._flights.pop(microbatch)):
            if segment.outputs is None:
                self._run(segment, microbatch)
            assert segment.outputs is not None, "a segment that ran has outputs"
            roots = [out for out in segment.outputs if out.requires_grad]
            if roots:
                torch.autograd.backward(roots, list(grads) if grads else None)
            grads = [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                for leaf in segment.leaves
                if leaf.requires_grad
            ]
        self.gradients.collect()
        return tuple(g for g in grads if g is not None)

    def backward_input(self, microbatch: int, output_grads: Tensors = ()) -> Tensors:
        """I: gradients of the inputs; large weight gradients wait for W.

        Args:
            microbatch: global index in the step.
            output_grads: one for each output that requires a gradient; none for the last stage.
        """
        queue = WeightGradQueue(self._holder)
        with queue.capture():
            input_grads = self.backward(microbatch, output_grads)
        self._queues[microbatch] = queue
        return input_grads

    def backward_weight(self, microbatch: int) -> None:
        """W: the weight gradients that I left."""
        self.gradients.aim(self._group_of[microbatch])
        self._queues.pop(microbatch).flush()
        self.gradients.collect()

    def abandon(self) -> None:
        """Drop everything in flight: the step will not be finished."""
        self._flights.clear()
        self._queues.clear()

    def _run(self, segment: _Segment, microbatch: int) -> None:
        habits = self._habits.get(segment.layers[0].index)
        copy = habits is not None and habits.writes_inputs
        with torch.enable_grad():
            values = tuple(leaf.clone() if copy else _enter(leaf) for leaf in segment.leaves)
            outputs = self._apply(segment.layers, values, microbatch)
            if self._loss is not None and segment.layers[-1] is self.layers[-1]:
                assert segment.targets is not None, "the last stage was given no targets"
                loss = self._loss(outputs[0], segment.targets)
                self.losses[microbatch] = loss.detach()
                outputs = (loss / self._num_microbatches,)
        segment.outputs = outputs

    def _run_without_graph(self, segment: _Segment, microbatch: int) -> Tensors:
        key = segment.layers[0].index
        habits = self._habits.get(key)
        with torch.set_grad_enabled(habits is None):
            # A layer may write to its inputs; the leaves are needed again.
            copy = habits is None or habits.writes_inputs
            values = tuple(leaf.clone() if copy else leaf for leaf in segment.leaves)
            outputs = self._apply(segment.layers, values, microbatch)
        if habits is None:
            habits = self._habits[key] = _Habits(
                requires_grad=tuple(out.requires_grad for out in outputs),
                writes_inputs=any(value._version > 0 for value in values),
            )
        return tuple(
            out.detach().requires_grad_(requires_grad)
            for out, requires_grad in zip(outputs, habits.requires_grad, strict=True)
        )

    def _apply(self, layers: Sequence[Layer], values: Tensors, microbatch: int) -> Tensors:
        for position, layer in enumerate(layers):
            if position > 0:
                values = tuple(map(_enter, values))
            seed = mix(self._seed, self._step, microbatch, layer.index)
            seed_generators(seed, self._device)
            result = layer.module(*values)
            values = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        return values


class _Boundary(torch.autograd.Function):
    """Identity between two layers, contiguous both ways.

    Tensors are contiguous where a cut sends them, and the layout of an operand can change the
    bits of a product; so they are contiguous between any two layers. What it returns is no
    leaf: the next layer may write to it, as it may inside one process.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


def _enter(x: torch.Tensor) -> torch.Tensor:
    if not x.requires_grad:
        return x.contiguous()
    out: torch.Tensor = _Boundary.apply(x)  # type: ignore[no-untyped-call]
    return out


def _as_leaves(tensors: Tensors) -> Tensors:
    return tuple(t.detach().contiguous().requires_grad_(t.requires_grad) for t in tensors)
