"""When the weight gradients of a layer are computed: found out by trying, once.

A way other than the plain backward is taken only if inputs, weights and buffers get the same
bits, no part of the forward runs more often, no random numbers are drawn again, and tensor
hooks fire as often. The trials run on copies of the layer. What a copy cannot hide: hooks on
modules, and random numbers that are not torch's, are used a few times more often.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping

import torch

from deepopt.pipeline.weight_trial import (
    StructuredOutputError,
    Subject,
    Tensors,
    Trial,
    copy_of,
    try_way,
)
from deepopt.pipeline.weight_ways import Verdict, Way

_LARGE = 0.05  # share of a layer's elements from which a matrix may wait by itself
# A weight gradient that waits can fill a bubble. A step has about one bubble for two
# micro-batches (m = 2p), and each micro-batch pays: so at most half of what the input gradient
# gains.
_WORTH = 0.5
# What copy.deepcopy() lets through from objects that refuse.
_UNCOPYABLE = (TypeError, ValueError, RuntimeError, AttributeError, pickle.PicklingError)


def probe(
    module: torch.nn.Module,
    *,
    inputs: Tensors,
    seed: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Verdict:
    """Choose the way of one layer.

    Args:
        module: the layer; its parameters, buffers, gradients and hooks stay as they are.
        inputs: of one micro-batch; those that take a gradient say so.
        seed: sets the random generators as the stage does before this layer.
        clock: seconds; waits for the layer's device.

    Raises:
        Exception: what the layer itself raises.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in parameters.items()}
    subject = Subject(
        module=module, parameters=parameters, inputs=inputs, seed=seed, clock=clock
    )
    try:
        return _choose(subject)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = grads[name]


def _choose(subject: Subject) -> Verdict:
    if not subject.parameters:
        return Verdict(way=Way.FUSED)
    obstacle = _obstacle(subject)
    if obstacle:
        return Verdict(way=Way.FUSED, reason=obstacle)
    try:
        plain = try_way(subject, Way.FUSED)
    except StructuredOutputError as error:
        return Verdict(way=Way.FUSED, reason=f"it returns a {error}, not tensors")
    queued = _attempt(subject, Way.DEFERRED, plain)
    if isinstance(queued, str):
        return Verdict(way=Way.FUSED, reason=queued)
    best = Verdict(way=Way.DEFERRED if queued.queued else Way.FUSED)
    rest = _large(subject.parameters) - queued.queued
    if not rest:
        return best
    divided = _attempt(subject, Way.SPLIT, plain, split=rest)
    if isinstance(divided, str):
        return _but(best, rest, divided)
    refusals = "; ".join(f"{name}: {why}" for name, why in sorted(divided.refused.items()))
    split = rest - divided.refused.keys()
    if not split:
        return _but(best, frozenset(), refusals)
    loss = _not_worth(queued if queued.queued else plain, divided)
    if loss:
        return _but(best, split, loss)
    return Verdict(way=Way.SPLIT, reason=refusals, split=split)


def _but(best: Verdict, names: frozenset[str], why: str) -> Verdict:
    reason = f"{', '.join(sorted(names))}: {why}" if names else why
    return Verdict(way=best.way, reason=reason)


def _obstacle(subject: Subject) -> str:
    """What rules out any other way before it is tried; empty for nothing."""
    for name, parameter in subject.parameters.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"{name} has a hook, which must see its gradient"
    for name, part in subject.module.named_modules():
        # The second is what torch.compile() wraps around a module.
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(
            part, "_torchdynamo_orig_callable"
        ):
            return f"{name or 'the layer'} is compiled: its backward is one piece"
    try:
        copy_of(subject.module)
    except _UNCOPYABLE as error:
        return f"no copy of the layer can be made to try it on: {error}"
    return ""


def _large(parameters: Mapping[str, torch.nn.Parameter]) -> frozenset[str]:
    least = _LARGE * sum(p.numel() for p in parameters.values())
    return frozenset(n for n, p in parameters.items() if p.dim() >= 2 and p.numel() >= least)


def _attempt(
    subject: Subject, way: Way, plain: Trial, *, split: frozenset[str] = frozenset()
) -> Trial | str:
    """The trial of a way, or why it cannot be taken."""
    try:
        trial = try_way(subject, way, split=split)
    except RuntimeError as error:  # what torch raises where a backward cannot be divided
        return f"{way}: {str(error).splitlines()[0]}"
    if trial.calls > plain.calls:
        extra = trial.calls - plain.calls
        return f"{way}: {extra} more calls of modules to recompute the forward"
    if trial.hook_calls != plain.hook_calls:
        return (
            f"{way}: tensor hooks fire {trial.hook_calls} times instead of {plain.hook_calls}"
        )
    if not torch.equal(trial.random_state, plain.random_state):
        return f"{way}: random numbers would be drawn again"
    for name, value in plain.results.items():
        if not _same(trial.results[name], value):
            return f"{way}: {name} gets other bits"
    return trial


def _not_worth(now: Trial, divided: Trial) -> str:
    """Why a split backward costs more than it gives; empty when it does not."""
    before, after = now.input_s + now.weight_s, divided.input_s + divided.weight_s
    gain = now.input_s - divided.input_s
    if after - before <= _WORTH * gain:
        return ""
    return (
        f"a split backward takes {after * 1e3:.2f} ms instead of {before * 1e3:.2f} "
        f"and brings the input gradient only {max(gain, 0.0) * 1e3:.2f} ms earlier"
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # Bits, not values: a NaN equals itself, and -0.0 is not 0.0.
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8) if x.numel() else x.view(-1)
