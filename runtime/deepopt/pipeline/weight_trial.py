"""One backward through a copy of a layer, done one way, with all that must not differ between
ways written down.

The copy shares the layer's parameters and nothing else. It does not compare or choose:
`weight_probe` does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepopt.pipeline.graph_split import SplitBackward
from deepopt.pipeline.weight_ways import Way
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue, defer_linears

Tensors = tuple[torch.Tensor, ...]

_TIMED_RUNS = 3  # the fastest counts: noise only adds


class StructuredOutputError(Exception):
    """A layer returns what only its loss can read: no gradient can be put into it from outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of one way.

    Args:
        way: that was tried.
        results: gradients of inputs and parameters, and the buffers afterwards, by name.
        calls: calls of modules, recomputation included.
        hook_calls: calls of tensor hooks that the forward registered.
        random_state: of the CPU's default generator after the backward.
        queued: names of parameters whose gradients a queue took.
        refused: name -> why a split graph cannot serve it.
        input_s: the fastest first part (all of it, when fused), in seconds.
        weight_s: the second part of the run with the fastest sum.
    """

    way: Way
    results: Mapping[str, torch.Tensor | None]
    calls: int
    hook_calls: int
    random_state: torch.Tensor
    queued: frozenset[str]
    refused: Mapping[str, str]
    input_s: float
    weight_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A layer and what it is tried on.

    Args:
        module: the layer; only its parameters' gradients are borrowed.
        parameters: the trainable ones, by local name.
        inputs: of one micro-batch; those that take a gradient say so.
        seed: sets the random generators as the stage does before this layer.
        clock: seconds; waits for the layer's device.
    """

    module: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    inputs: Tensors
    seed: Callable[[], None]
    clock: Callable[[], float]


def try_way(subject: Subject, way: Way, *, split: frozenset[str] = frozenset()) -> Trial:
    """Run one micro-batch forward and backward.

    Args:
        subject: the layer.
        way: when weight gradients are computed.
        split: names of the parameters to leave to the second part of a split backward.

    Returns:
        What came of it. Gradients are added to values drawn from a seed, so that a change in
        the order of additions shows.
    """
    module = copy_of(subject.module)
    holder = WeightGradHolder()
    if way is not Way.FUSED:
        defer_linears(module, holder)
    run = _Run(subject, module, holder, way, split)
    counter = _CallCounter()
    handles = [part.register_forward_pre_hook(counter.called) for part in module.modules()]
    for number, parameter in enumerate(subject.parameters.values()):
        parameter.grad = _noise(parameter, number)
    run.once(watch=counter)
    for handle in handles:
        handle.remove()
    random_state = torch.get_rng_state()
    results: dict[str, torch.Tensor | None] = {
        f"gradient of input {i}": leaf.grad for i, leaf in enumerate(run.leaves)
    }
    for name, parameter in subject.parameters.items():
        results[f"gradient of {name}"] = parameter.grad
        parameter.grad = None
    results |= {f"buffer {name}": b.clone() for name, b in module.named_buffers()}
    queued, refused = run.queued, run.refused
    best = (math.inf, math.inf)
    for _ in range(_TIMED_RUNS):
        best = min(best, run.once(watch=None), key=sum)
    for parameter in subject.parameters.values():
        parameter.grad = None
    return Trial(
        way=way,
        results=results,
        calls=counter.calls,
        hook_calls=counter.hook_calls,
        random_state=random_state,
        queued=queued,
        refused=refused,
        input_s=best[0],
        weight_s=best[1],
    )


def copy_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares the module's parameters.

    Raises:
        Exception: what a part of it raises that cannot be copied.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, shared)


class _Run:
    def __init__(
        self,
        subject: Subject,
        module: torch.nn.Module,
        holder: WeightGradHolder,
        way: Way,
        split: frozenset[str],
    ) -> None:
        self._subject = subject
        self._module = module
        self._holder = holder
        self._way = way
        self._split = {name: subject.parameters[name] for name in split}
        self.leaves: Tensors = ()
        self.queued: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}

    def once(self, *, watch: _CallCounter | None) -> tuple[float, float]:
        """Seconds of the first and of the second part."""
        clock, inputs = self._subject.clock, self._subject.inputs
        self.leaves = tuple(
            t.detach()
            .clone(memory_format=torch.contiguous_format)
            .requires_grad_(t.requires_grad)
            for t in inputs
        )
        watching: AbstractContextManager[Any] = nullcontext() if watch is None else watch
        with torch.enable_grad(), watching:
            self._subject.seed()
            # A layer may write to its inputs, but not to leaves that take gradients.
            entered = tuple(leaf * 1 if leaf.requires_grad else leaf for leaf in self.leaves)
            result = self._module(*entered)
        values = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        for value in values:
            if not isinstance(value, torch.Tensor):
                raise StructuredOutputError(type(value).__name__)
        roots = [value for value in values if value.requires_grad]
        grads = [_noise(root, -1 - number) for number, root in enumerate(roots)]
        del result, values, entered
        queue = WeightGradQueue(self._holder)
        if not roots:
            return 0.0, 0.0
        start = clock()
        divided = None
        with nullcontext() if self._way is Way.FUSED else queue.capture():
            if self._way is Way.SPLIT:
                leaves = [leaf for leaf in self.leaves if leaf.requires_grad]
                divided = SplitBackward(
                    roots, inputs=leaves, weights=list(self._split.values())
                )
                roots.clear()
                divided.run_inputs(grads)
            else:
                torch.autograd.backward(roots, grads)
        middle = clock()
        queued = {id(weight) for weight in queue.weights()}
        queue.flush()
        if divided is not None:
            divided.run_weights()
        end = clock()
        names = self._subject.parameters
        self.queued = frozenset(name for name, p in names.items() if id(p) in queued)
        if divided is not None:
            self.refused = {
                name: why
                for name, p in self._split.items()
                if (why := divided.refused.get(p)) is not None
            }
        return middle - start, end - middle


class _CallCounter(TorchFunctionMode):
    """Counts the calls of modules, and of the tensor hooks registered inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.hook_calls = 0

    def called(self, module: torch.nn.Module, inputs: object) -> None:
        self.calls += 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.register_hook:
            tensor, hook = args

            def counted(grad: torch.Tensor) -> Any:
                self.hook_calls += 1
                return hook(grad)

            return func(tensor, counted)
        return func(*args, **(kwargs or {}))


def _noise(like: torch.Tensor, number: int) -> torch.Tensor:
    """Normal values that depend on the number alone."""
    generator = torch.Generator(like.device)
    generator.manual_seed(number & 0xFFFFFFFF)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
