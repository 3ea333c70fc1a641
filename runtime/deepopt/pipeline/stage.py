"""A stage: a contiguous range of layers on one worker, and what it does with one micro-batch.

F, B, I, W and R are methods here. The stage knows its layers, loss and gradients; it does not
know ranks, schedules or transports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deepopt.errors import TrainingError
from deepopt.pipeline.backward import add_gradients, gradient_at
from deepopt.pipeline.boundary import as_leaves, enter
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.graph_split import SplitBackward, has_leaf
from deepopt.pipeline.randomness import mix, seed_generators
from deepopt.pipeline.stage_experts import StageExperts
from deepopt.pipeline.weight_probe import probe
from deepopt.pipeline.weight_ways import Verdict, Way
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue, defer_linears

Tensors = tuple[torch.Tensor, ...]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (micro-batch, output, targets) -> output and targets of the samples that count.
Cut = Callable[[int, Any, torch.Tensor], tuple[Any, torch.Tensor]]


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
        frozen: values of frozen parameters that compute in a narrower type than they have, in host
            memory: what checkpoints and exports hold.
    """

    index: int
    name: str
    module: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that take gradients."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


@dataclass(slots=True)
class _Segment:
    """A run of layers with one autograd graph.

    `roots` is None until it has been run with gradients; `grads` are those of the roots where F
    computed them already.
    """

    layers: Sequence[Layer]
    leaves: Tensors
    targets: torch.Tensor | None = None
    roots: list[torch.Tensor] | list[GradientEdge] | None = None
    grads: list[torch.Tensor | None] | None = None


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
        recompute: indices of layers of which F keeps only the inputs; they run again for the
            backward.
        defer_weights: compute weight gradients in W instead of with the input gradient, in
            layers where a probe at the first micro-batch finds that right and worth it.
        known_ways: what a probe found of layers elsewhere, by name: those are not probed again.

    The gradient of the loss is computed with F where nothing but the output takes part in it: it
    then is all that stays of the loss, and I need not wait for it.

    Attributes:
        losses: by micro-batch, of this step.
        looks_for_bad: whether forwards look for outputs that are not finite.
        bad_layer: index of the first layer that had one in this step; -1 for none.
        experts: the routers of its layers.
        verdicts: how each layer's weight gradients are computed, by name, when `defer_weights`;
            what is not known is filled in by the first forward.
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
        recompute: Collection[int] = (),
        defer_weights: bool = False,
        known_ways: Mapping[str, Verdict] | None = None,
    ) -> None:
        self.index = index
        self.layers = tuple(layers)
        self.gradients = gradients
        self.losses: dict[int, torch.Tensor] = {}
        self.looks_for_bad = False
        self.bad_layer = -1
        self._group_of = group_of
        self._seed = seed
        self._step = 0
        self._device = device
        self._num_microbatches = num_microbatches
        self._loss = loss
        self._recompute = frozenset(recompute)
        self._flights: dict[int, list[_Segment]] = {}
        self._habits: dict[int, _Habits] = {}  # of recomputed segments, by first layer
        self._writes_inputs: dict[int, bool] = {}  # of segments kept in F, by first layer
        self._queues: dict[int, WeightGradQueue] = {}
        self._divided: dict[int, list[SplitBackward]] = {}
        self._holder = WeightGradHolder()
        self._defer_weights = defer_weights
        self.verdicts: dict[str, Verdict] = {}
        self._split: dict[int, list[torch.nn.Parameter]] = {}  # weights of split graphs
        for layer in self.layers:
            for module in layer.module.modules():
                if hasattr(module, "loss_scale"):  # losses that a layer adds on its own
                    module.loss_scale = 1.0 / num_microbatches  # type: ignore[assignment]
        self.experts = StageExperts(self.layers, device=device, recomputed=recompute)
        if defer_weights and known_ways:
            for layer in self.layers:
                if layer.name in known_ways:
                    self._arrange(layer, known_ways[layer.name])
        self._runs = self._cut_into_runs()
        self._known_loss_grad: torch.Tensor | None = None
        self._is_evaluating = False
        self._take_output: Callable[[int, Any], None] | None = None
        self._cut: Cut | None = None

    @contextmanager
    def evaluating(
        self, *, take_output: Callable[[int, Any], None] | None = None, cut: Cut | None = None
    ) -> Iterator[None]:
        """While this is open, F runs in eval mode and keeps nothing for a backward.

        Args:
            take_output: of the last stage: takes (micro-batch, the model's output) instead of a
                loss being computed.
            cut: of the last stage: leaves what a loss is computed of.
        """
        modules = [layer.module for layer in self.layers]
        self._is_evaluating, self._take_output, self._cut = True, take_output, cut
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for module in modules:
                module.train()
            self._is_evaluating, self._take_output, self._cut = False, None, None

    def begin_step(self, step: int) -> None:
        """Forget the last step's losses; its gradients stay until somebody zeroes them."""
        assert not self._flights, f"micro-batches {sorted(self._flights)} are still in flight"
        self._step = step
        self.losses.clear()
        self.bad_layer = -1
        self.experts.begin_step()

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
        flight = []
        values = tuple(t.to(self._device) for t in inputs)
        targets = None if targets is None else targets.to(self._device)
        if self._is_evaluating:
            return self._evaluate(microbatch, values, targets)
        unprobed = self._is_unprobed
        for layers in self._runs:
            if unprobed and layers[0].name not in self.verdicts:
                self._probe(layers[0], values, microbatch)
            ends = layers[-1] is self.layers[-1]
            segment = _Segment(layers, as_leaves(values), targets if ends else None)
            flight.append(segment)
            # The last layer and the loss are kept: their backward comes next, nothing would be
            # saved.
            again = layers[0].index in self._recompute
            if again and not (ends and self._loss is not None):
                values = self._run_without_graph(segment, microbatch)
            else:
                values = self._run(segment, microbatch)
        if unprobed:
            self._runs = self._cut_into_runs()
        self._flights[microbatch] = flight
        if self._loss is not None:
            return ()
        return tuple(v.detach().requires_grad_(v.requires_grad) for v in values)

    @torch.no_grad()
    def _evaluate(
        self, microbatch: int, values: Tensors, targets: torch.Tensor | None
    ) -> Tensors:
        outputs = self._apply(self.layers, values, microbatch)
        if self._loss is None:
            return outputs
        if self._take_output is not None:
            self._take_output(microbatch, outputs[0])
            return ()
        assert targets is not None, "the last stage was given no targets"
        output: Any = outputs[0]
        if self._cut is not None:
            output, targets = self._cut(microbatch, output, targets)
        self.losses[microbatch] = self._loss(output, targets)
        return ()

    def prepare(self, microbatch: int) -> None:
        """R: run again, with gradients, what F did not keep; nothing if it all is there."""
        for segment in self._flights[microbatch]:
            if segment.roots is None:
                self._run(segment, microbatch)

    def backward(self, microbatch: int, output_grads: Tensors = ()) -> Tensors:
        """B: gradients of the inputs and of the weights.

        Args:
            microbatch: global index in the step.
            output_grads: one for each output that requires a gradient; none for the last stage.

        Returns:
            Gradients of the inputs that require one, in their order.
        """
        return self._backward(microbatch, output_grads, divided=None)

    def backward_input(self, microbatch: int, output_grads: Tensors = ()) -> Tensors:
        """I: gradients of the inputs; large weight gradients wait for W.

        Args:
            microbatch: global index in the step.
            output_grads: one for each output that requires a gradient; none for the last stage.
        """
        queue = WeightGradQueue(self._holder)
        divided: list[SplitBackward] = []
        with queue.capture():
            input_grads = self._backward(microbatch, output_grads, divided=divided)
        self._queues[microbatch] = queue
        self._divided[microbatch] = divided
        return input_grads

    def backward_weight(self, microbatch: int) -> None:
        """W: the weight gradients that I left."""
        self.gradients.aim(self._group_of[microbatch])
        self._queues.pop(microbatch).flush()
        for backward in self._divided.pop(microbatch):
            backward.run_weights()
        self.gradients.collect()

    def weight_notes(self) -> list[str]:
        """A line for each layer whose large weight gradients do not all simply wait for W."""
        notes = []
        for layer in self.layers:
            verdict = self.verdicts.get(layer.name)
            if verdict is not None and (verdict.reason or verdict.way is Way.SPLIT):
                where = f"layer {layer.index} ({layer.name}, {type(layer.module).__name__})"
                split = f" for {', '.join(sorted(verdict.split))}" if verdict.split else ""
                why = f": {verdict.reason}" if verdict.reason else ""
                notes.append(f"{where}: {verdict.way}{split}{why}")
        return notes

    def abandon(self) -> None:
        """Drop everything in flight: the step will not be finished."""
        self._flights.clear()
        self._queues.clear()
        self._divided.clear()

    def _backward(
        self, microbatch: int, output_grads: Tensors, *, divided: list[SplitBackward] | None
    ) -> Tensors:
        """Go back through all segments; `divided` takes those that have a second part."""
        self.gradients.aim(self._group_of[microbatch])
        grads: list[torch.Tensor | None] = list(output_grads)
        flight = self._flights.pop(microbatch)
        while flight:  # each segment is freed when it is done
            segment = flight.pop()
            if segment.roots is None:
                self._run(segment, microbatch)
            roots, leaves = segment.roots, [t for t in segment.leaves if t.requires_grad]
            assert roots is not None, "a segment that ran has roots"
            if segment.grads is not None:
                grads = segment.grads
            weights = self._split.get(segment.layers[0].index)
            if divided is not None and weights and roots:
                backward = SplitBackward(roots, inputs=leaves, weights=weights)
                divided.append(backward)
                backward.run_inputs(grads)
            elif roots:
                add_gradients(roots, grads)
            grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        self.gradients.collect()
        return tuple(g for g in grads if g is not None)

    def _run(self, segment: _Segment, microbatch: int) -> Tensors:
        """Run with gradients; returns the outputs of the layers."""
        last = segment.layers[-1] is self.layers[-1]
        with torch.enable_grad():
            outputs = self._apply_to_leaves(segment, microbatch)
            if self._loss is not None and last:
                self._run_loss(segment, outputs[0], microbatch)
            else:
                segment.roots = [out for out in outputs if out.requires_grad]
        return outputs

    def _apply_to_leaves(self, segment: _Segment, microbatch: int) -> Tensors:
        key, leaves = segment.layers[0].index, segment.leaves
        if key in self._recompute:
            habits = self._habits.get(key)
            if habits is not None and habits.writes_inputs:
                values = tuple(leaf.clone() for leaf in leaves)
                return self._apply(segment.layers, values, microbatch)
        if self._writes_inputs.get(key) is False:
            try:
                return self._apply(segment.layers, leaves, microbatch)
            except (
                RuntimeError
            ) as error:  # this time it writes: autograd forbids that on leaves
                if "leaf Variable that requires grad" not in str(error):
                    raise
        versions = [leaf._version for leaf in leaves]
        outputs = self._apply(segment.layers, tuple(map(enter, leaves)), microbatch)
        self._writes_inputs[key] = [leaf._version for leaf in leaves] != versions
        return outputs

    def _run_loss(self, segment: _Segment, output: Any, microbatch: int) -> None:
        """The loss of the last layer's output: a tensor, or whatever the model returns."""
        assert self._loss is not None, "only the last stage has a loss"
        assert segment.targets is not None, "the last stage was given no targets"
        version = output._version if isinstance(output, torch.Tensor) else None
        loss = self._loss(output, segment.targets)
        self.losses[microbatch] = loss.detach()
        if not loss.requires_grad:
            segment.roots = []
            return
        grad = self._loss_grad(loss)
        segment.roots, segment.grads = [loss], [grad]
        if (
            version is None
            or output.grad_fn is None
            or loss.grad_fn is None
            or output._version != version
            or has_leaf(loss.grad_fn, stop=output.grad_fn)
        ):
            return
        # The output itself is not needed, nor is anything of the loss.
        segment.grads = [gradient_at(loss, output, grad=grad)]
        segment.roots = [get_gradient_edge(output)]

    def _loss_grad(self, loss: torch.Tensor) -> torch.Tensor:
        """What a micro-batch's loss adds to the loss of the step; the same for each of them."""
        known = self._known_loss_grad
        if known is None or known.dtype != loss.dtype or known.shape != loss.shape:
            if loss.numel() != 1:
                raise TrainingError(
                    f"the loss has the shape {list(loss.shape)}, and should be one number",
                    remedy="let the loss return the mean over the samples of a micro-batch",
                )
            known = self._known_loss_grad = torch.ones_like(loss) / self._num_microbatches
        # A copy: a backward may write to what it gets, or hand it on as a gradient.
        return known.clone()

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

    def _probe(self, layer: Layer, values: Tensors, microbatch: int) -> None:
        """Find out when this layer's weight gradients are computed, and arrange for it."""

        def seed() -> None:
            seed_generators(mix(self._seed, self._step, microbatch, layer.index), self._device)

        self._arrange(layer, probe(layer.module, inputs=values, seed=seed, clock=self._clock))

    def _arrange(self, layer: Layer, verdict: Verdict) -> None:
        """Have a layer's weight gradients computed in the way that was found."""
        self.verdicts[layer.name] = verdict
        if verdict.way is not Way.FUSED:
            defer_linears(layer.module, self._holder)
        if verdict.way is Way.SPLIT:
            parameters = dict(layer.module.named_parameters())
            self._split[layer.index] = [parameters[name] for name in sorted(verdict.split)]

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def _is_unprobed(self) -> bool:
        return self._defer_weights and len(self.verdicts) < len(self.layers)

    def _cut_into_runs(self) -> list[tuple[Layer, ...]]:
        """Layers of one graph each: as many as possible together."""
        runs: list[tuple[Layer, ...]] = []
        unprobed = self._is_unprobed
        alone = self._recompute | self._split.keys()
        for layer in self.layers:
            joins = (
                runs and not unprobed and alone.isdisjoint({layer.index, runs[-1][-1].index})
            )
            runs[-1:] = [(*runs[-1], layer)] if joins else [*runs[-1:], (layer,)]
        return runs

    def _apply(self, layers: Sequence[Layer], values: Tensors, microbatch: int) -> Tensors:
        for position, layer in enumerate(layers):
            if position > 0:
                values = tuple(map(enter, values))
            seed = mix(self._seed, self._step, microbatch, layer.index)
            seed_generators(seed, self._device)
            self.experts.begin_pass(layer.index, microbatch)
            result = layer.module(*values)
            values = (result,) if isinstance(result, torch.Tensor) else tuple(result)
            if self.looks_for_bad and self.bad_layer < 0 and not _all_finite(values):
                self.bad_layer = layer.index
        return values


def _all_finite(tensors: Tensors) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())
