"""Measure what layers cost on the device of this process, before a plan is made.

One layer of each kind is built and run as a stage of its own, with the job's own batch: F, I and W
(and R, which is a forward again) as the executor will call them. Links and other devices are not
measured. It takes a second or so; a model too large to try is left to estimates.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.datasets.batch_source import BatchSource
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.stage import Layer, Loss, Stage, Tensors
from deepopt.planner.estimate import estimated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.measured import MEASURED
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton

logger = logging.getLogger(__name__)

MOST_PARAMETERS = 100_000_000  # 400 MB in fp32, and as much for each of gradients and moments
_T = TypeVar("_T")
_REPEATS = 3  # of which the median counts, after one that warms up


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What one layer took.

    Args:
        forward_s: F, and so on.
        activation_bytes: what autograd kept, weights left out.
        outputs: to feed the next layer; empty for the last one.
    """

    forward_s: float
    input_s: float
    weight_s: float
    update_s: float
    activation_bytes: float
    outputs: Tensors


def calibrate(
    job: JobConfig, skeleton: ModelSkeleton, *, batches: BatchSource, device: torch.device
) -> LayerCosts | None:
    """Costs of all layers, measured on one of each kind.

    Layers of the same class, parameters, operations and input shapes are of one kind.

    Args:
        job: the resolved job; `worker.threads` is used while measuring.
        skeleton: its model.
        batches: gives the batch of step 1.
        device: where to measure.

    Returns:
        None when the layers of all kinds together are too large to try, a batch is more than one
        tensor, or the model fails: that is reported by the worker to which it happens.
    """
    try:
        return _calibrate(job, skeleton, batches=batches, device=device)
    except Exception as error:  # noqa: BLE001 - the user's code, at the edge to it
        logger.info("no layer costs measured: %s: %s", type(error).__name__, error)
        return None


def _calibrate(
    job: JobConfig, skeleton: ModelSkeleton, *, batches: BatchSource, device: torch.device
) -> LayerCosts | None:
    signatures = [
        _signature(layer, is_last=index == len(skeleton.layers) - 1)
        for index, layer in enumerate(skeleton.layers)
    ]
    first = {signature: index for index, signature in reversed([*enumerate(signatures)])}
    tried = sorted(first.values())
    if sum(p.numel for i in tried for p in skeleton.layers[i].parameters) > MOST_PARAMETERS:
        return None
    with _threads(job.worker.threads):
        layers, loss = build_layers(job, tried, device=device)
        by_signature = {
            signatures[index]: layer for index, layer in zip(tried, layers, strict=True)
        }
        inputs, targets = batches.batch(1, 0)
        if not isinstance(inputs, torch.Tensor):
            return None
        values: Tensors = (inputs,)
        trials: dict[tuple[object, ...], _Trial] = {}
        found: list[_Trial] = []
        sizes: list[float] = []
        for index, signature in enumerate(signatures):
            key = (signature, *((t.shape, t.dtype, t.requires_grad) for t in values))
            sizes.append(_num_bytes(values))
            if key not in trials:
                is_last = index == len(signatures) - 1
                trials[key] = _try(
                    by_signature[signature],
                    values,
                    job=job,
                    device=device,
                    loss=loss if is_last else None,
                    targets=targets if is_last else None,
                )
            found.append(trials[key])
            values = trials[key].outputs
    forward_s = tuple(trial.forward_s for trial in found)
    return replace(
        estimated_costs(job, skeleton),
        forward_s=forward_s,
        input_s=tuple(trial.input_s for trial in found),
        weight_s=tuple(trial.weight_s for trial in found),
        prepare_s=forward_s if job.pipeline.recompute == "full" else (),
        update_s=tuple(trial.update_s for trial in found),
        activation_bytes=tuple(trial.activation_bytes for trial in found),
        input_bytes=tuple(sizes) if job.pipeline.recompute == "full" else (),
        output_bytes=tuple(_num_bytes(trial.outputs) for trial in found),
        source=MEASURED,
    )


def _signature(layer: LayerSkeleton, *, is_last: bool) -> tuple[object, ...]:
    parameters = tuple((p.shape, p.dtype, p.requires_grad) for p in layer.parameters)
    return (layer.kind, parameters, layer.forward_flops_per_token, is_last)


def _try(
    layer: Layer,
    inputs: Tensors,
    *,
    job: JobConfig,
    device: torch.device,
    loss: Loss | None,
    targets: torch.Tensor | None,
) -> _Trial:
    gradients = StageGradients(layer.trainable, apart=(), groups=(0,), device=device)
    stage = Stage(
        0,
        [layer],
        gradients=gradients,
        group_of=dict.fromkeys(range(_REPEATS + 1), 0),
        seed=job.training.seed,
        device=device,
        num_microbatches=job.training.microbatches,
        loss=loss,
        defer_weights=True,
    )
    optimizer = LayerOptimizer(layer, job.optimizer)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters.values()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    stage.begin_step(1)
    outputs: Tensors = ()
    times: list[list[float]] = [[], [], [], []]
    for repeat in range(_REPEATS + 1):
        kept.clear()  # memory that was freed is used again
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            took, outputs = _timed(
                lambda m=repeat: stage.forward(m, inputs, targets),  # type: ignore[misc]
                device,
            )
        times[0].append(took)
        grads = tuple(torch.ones_like(out) for out in outputs if out.requires_grad)
        times[1].append(
            _timed(lambda m=repeat, g=grads: stage.backward_input(m, g), device)[0]  # type: ignore[misc]
        )
        times[2].append(
            _timed(lambda m=repeat: stage.backward_weight(m), device)[0]  # type: ignore[misc]
        )
        totals = gradients.totals()
        times[3].append(_timed(lambda t=totals: optimizer.step(t, 0.0), device)[0])  # type: ignore[misc]
    forward_s, input_s, weight_s, update_s = (statistics.median(own[1:]) for own in times)
    return _Trial(
        forward_s=forward_s,
        input_s=input_s,
        weight_s=weight_s,
        update_s=update_s,
        activation_bytes=float(sum(kept.values())),
        outputs=outputs,
    )


def _timed(run: Callable[[], _T], device: torch.device) -> tuple[float, _T]:
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, result


def _num_bytes(tensors: Sequence[torch.Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
