"""What layers cost before anything was measured: from floating-point operations and sizes. Pure."""

from __future__ import annotations

from dataclasses import replace

from deepopt.config import JobConfig
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton

# F : I : W of a transformer layer, as measured on a CPU: 20, 22 and 16 ms.
_INPUT_PER_FORWARD = 22 / 20
_WEIGHT_PER_FORWARD = 16 / 20
_STATE_BYTES = 16  # of each parameter: itself, its gradient and two moments in fp32
_GRADIENT_BYTES = 4
ESTIMATED_FLOPS = 1e12
"""Operations per second where no device was measured: only ratios of times follow from it."""


def relative_costs(skeleton: ModelSkeleton) -> tuple[float, ...]:
    """What each layer costs, in units of its own: forward operations per token.

    Where no layer states its operations, the number of its parameters stands for them; where
    there are none either, all layers are equal.

    Args:
        skeleton: the model's layers.
    """
    flops = tuple(layer.forward_flops_per_token for layer in skeleton.layers)
    if any(flops):
        return flops
    parameters = tuple(
        float(sum(p.numel for p in layer.parameters)) for layer in skeleton.layers
    )
    return parameters if any(parameters) else (1.0,) * len(skeleton.layers)


def estimated_costs(job: JobConfig, skeleton: ModelSkeleton) -> LayerCosts:
    """Costs by operations, in the ratio that was measured of a transformer layer.

    Emulated devices take what the job says. Links, updates and memory are not estimated.

    Args:
        job: sizes of a micro-batch; whether it recomputes.
        skeleton: the model's layers.

    Raises:
        PlanError: the job emulates other layers than the model has.
    """
    if job.worker.device == "emulated":
        stated = emulated_costs(job, num_layers=len(skeleton.layers))
        # The job states no size for what tied weights exchange: it takes a latency.
        ties = tuple((first, second, 0.0) for first, second, _ in tied_layers(skeleton))
        return replace(stated, ties=ties)
    tokens = job.training.microbatch_size * job.data.sequence_length
    forward = tuple(cost * tokens / ESTIMATED_FLOPS for cost in relative_costs(skeleton))
    recompute = job.pipeline.recompute != "none"
    return LayerCosts(
        forward_s=forward,
        input_s=tuple(time * _INPUT_PER_FORWARD for time in forward),
        weight_s=tuple(time * _WEIGHT_PER_FORWARD for time in forward),
        prepare_s=forward if recompute else (),
        gradient_bytes=tuple(_GRADIENT_BYTES * _trainable(layer) for layer in skeleton.layers),
        # Each use of tied weights is a copy with moments of its own.
        state_bytes=tuple(
            float(_STATE_BYTES * sum(p.numel for p in layer.parameters))
            for layer in skeleton.layers
        ),
        ties=tied_layers(skeleton),
        source="estimated",
    )


def tied_layers(skeleton: ModelSkeleton) -> tuple[tuple[int, int, float], ...]:
    """Both layers of each pair of tied weights, and the bytes of their gradient.

    Args:
        skeleton: the model.
    """
    holder = {
        p.name: index for index, layer in enumerate(skeleton.layers) for p in layer.parameters
    }
    return tuple(
        (holder[p.tied_to], index, float(_GRADIENT_BYTES * p.numel))
        for index, layer in enumerate(skeleton.layers)
        for p in layer.parameters
        if p.tied_to is not None and p.requires_grad and p.tied_to in holder
    )


def _trainable(layer: LayerSkeleton) -> int:
    return sum(p.numel for p in layer.parameters if p.requires_grad)
