"""Measure what layers cost on the device of this process, before a plan is made.

One layer of each kind is built and run as a stage of its own, with the job's own batch: F, I and W
(and R, which is a forward again) as the executor will call them. Links and other devices are not
measured. It takes a second or so; a model too large to try is left to estimates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.datasets.batch_source import BatchSource
from deepopt.pipeline.same_host_transport import MOST_RANKS_OF_EXCHANGE
from deepopt.pipeline.stage import Tensors
from deepopt.planner.estimate import estimated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.measured import MEASURED
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton
from deepopt.worker.layer_trial import (
    Clock,
    LayerTrial,
    PausedClock,
    cpu_threads,
    num_bytes,
    real_clock,
    try_layer,
)
from deepopt.worker.message_trial import try_messages

logger = logging.getLogger(__name__)

MOST_PARAMETERS = 100_000_000  # 400 MB in fp32, and as much for each of gradients and moments


def calibrate(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    batches: BatchSource,
    device: torch.device,
    clock: Clock | None = None,
) -> LayerCosts | None:
    """Costs of all layers, measured on one of each kind.

    Layers of the same class, parameters, operations and input shapes are of one kind.

    Args:
        job: the resolved job; `worker.threads` is used while measuring.
        skeleton: its model.
        batches: gives the batch of step 1.
        device: where to measure.
        clock: what takes the times; None: that of the device.

    Returns:
        None when the layers of all kinds together are too large to try, a batch is more than one
        tensor, or the model fails: that is reported by the worker to which it happens.
    """
    try:
        clock = clock or real_clock(device, threads=job.worker.threads)
        return _calibrate(job, skeleton, batches=batches, device=device, clock=clock)
    except Exception as error:  # noqa: BLE001 - the user's code, at the edge to it
        logger.info("no layer costs measured: %s: %s", type(error).__name__, error)
        return None


def with_host_work(
    costs: LayerCosts,
    *,
    job: JobConfig,
    skeleton: ModelSkeleton,
    batches: BatchSource,
    num_workers: int,
    cores: int,
) -> LayerCosts:
    """Costs of emulated layers with what the real ones take of this host's cores, which all workers share.

    Args:
        costs: as stated.
        job: the resolved job.
        skeleton: its model.
        batches: gives the batch of step 1.
        num_workers: of the job.
        cores: of this host.

    Returns:
        The costs as they are where each worker has a core of its own, or nothing can be tried.
    """
    if num_workers <= cores:
        return costs
    real = calibrate(
        job, skeleton, batches=batches, device=torch.device("cpu"), clock=PausedClock()
    )
    if real is None:
        return costs
    return replace(
        costs,
        host_forward_s=real.forward_s,
        host_input_s=real.input_s,
        host_weight_s=real.weight_s,
        host_cores=cores,
    )


def with_messages(
    costs: LayerCosts, *, job: JobConfig, num_workers: int, cores: int | None
) -> LayerCosts:
    """Costs with what messages between workers of this host take of its CPU.

    Args:
        costs: of the layers.
        job: the resolved job.
        num_workers: of the job: all of them meet at the end of a step.
        cores: that all workers share: then all threads of a message count; None where each has a
            device of its own: then it is kept from work by what its own thread does.

    Returns:
        The costs as they are for devices other than CPUs: their messages go by themselves.
    """
    if num_workers < 2 or job.worker.device == "cuda" or torch.cuda.is_available():
        return costs
    try:
        trial = try_messages(same_host=job.pipeline.same_host)
    except RuntimeError as error:
        logger.info("no messages measured: %s", error)
        return costs
    # A message is a dozen figures for each rank: handed on around the ring of ranks by gloo, and given to
    # each other rank, whose answers come meanwhile, through shared memory.
    hops = num_workers - 1
    at_once = (
        job.pipeline.same_host == "shared_memory" and num_workers <= MOST_RANKS_OF_EXCHANGE
    )
    end = trial.thread if cores is None else trial.process
    # Ends that share cores wait for a core, which the simulation has; others sleep until woken, and their
    # cores have done something else meanwhile.
    wall_s, end_s = trial.wall.alpha_s, end.alpha_s
    if cores is None:
        wall_s, end_s = trial.woken_s, max(end_s, trial.woken_thread_s)
    return replace(
        costs,
        message_s=end_s,
        # Bytes that a job states of emulated layers pass through no CPU: real tensors are small.
        message_bytes_per_s=None if job.worker.device == "emulated" else end.bytes_per_s,
        latency_s=max(costs.latency_s, wall_s - 2 * end_s),
        agree_s=max(
            costs.latency_s,
            wall_s + hops * 2 * end_s if at_once else hops * max(wall_s, 2 * end_s),
        ),
    )


def _calibrate(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    batches: BatchSource,
    device: torch.device,
    clock: Clock,
) -> LayerCosts | None:
    signatures = layer_kinds(skeleton.layers)
    first = {signature: index for index, signature in reversed([*enumerate(signatures)])}
    tried = sorted(first.values())
    if sum(p.numel for i in tried for p in skeleton.layers[i].parameters) > MOST_PARAMETERS:
        return None
    with cpu_threads(job.worker.threads):
        layers, loss = build_layers(job, tried, device=device)
        by_signature = {
            signatures[index]: layer for index, layer in zip(tried, layers, strict=True)
        }
        inputs, targets = batches.batch(1, 0)
        if not isinstance(inputs, torch.Tensor):
            return None
        values: Tensors = (inputs,)
        trials: dict[tuple[object, ...], LayerTrial] = {}
        found: list[LayerTrial] = []
        sizes: list[float] = []
        for index, signature in enumerate(signatures):
            key = (signature, *((t.shape, t.dtype, t.requires_grad) for t in values))
            sizes.append(num_bytes(values))
            if key not in trials:
                is_last = index == len(signatures) - 1
                trials[key] = try_layer(
                    by_signature[signature],
                    values,
                    job=job,
                    device=device,
                    clock=clock,
                    loss=loss if is_last else None,
                    targets=targets if is_last else None,
                )
            found.append(trials[key])
            values = trials[key].outputs
    forward_s = tuple(median(trial.forward_s) for trial in found)
    return replace(
        estimated_costs(job, skeleton),
        forward_s=forward_s,
        input_s=tuple(median(trial.input_s) for trial in found),
        weight_s=tuple(median(trial.weight_s) for trial in found),
        prepare_s=forward_s if job.pipeline.recompute != "none" else (),
        update_s=tuple(median(trial.update_s) for trial in found),
        warm_up_s=tuple(trial.longer_s for trial in found),
        activation_bytes=tuple(trial.activation_bytes for trial in found),
        input_bytes=tuple(sizes) if job.pipeline.recompute != "none" else (),
        output_bytes=tuple(num_bytes(trial.outputs) for trial in found),
        source=MEASURED,
    )


def layer_kinds(layers: Sequence[LayerSkeleton]) -> list[tuple[object, ...]]:
    """What tells layers of one kind from others: the same class, parameters and operations.

    The last layer is a kind of its own: it runs the loss.

    Args:
        layers: in chain order.
    """
    return [
        (
            layer.kind,
            tuple((p.shape, p.dtype, p.requires_grad, p.fp8) for p in layer.parameters),
            layer.forward_flops_per_token,
            index == len(layers) - 1,
        )
        for index, layer in enumerate(layers)
    ]
