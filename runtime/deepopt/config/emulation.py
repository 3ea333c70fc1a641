"""Section `emulation`: how long an emulated device takes for each operation."""

from __future__ import annotations

from pydantic import Field

from deepopt.config_fields import Figure, PerLayer, Positive, Section


class EmulationConfig(Section):
    """What `worker.device: emulated` takes: a figure for all layers, or a list, one for each."""

    forward_ms: PerLayer = Field(
        default=20.0, description="Forward of a layer on one micro-batch, in milliseconds."
    )
    input_ms: PerLayer = Field(
        default=22.0, description="Gradient of a layer's input, in milliseconds."
    )
    weight_ms: PerLayer = Field(
        default=16.0, description="Gradient of a layer's weights, in milliseconds."
    )
    prepare_ms: PerLayer | None = Field(
        default=None,
        description="Repeating a layer's forward with `pipeline.recompute: full`, in "
        "milliseconds; null: as `forward_ms`.",
    )
    update_ms: PerLayer = Field(
        default=0.0,
        description="What each holder of a layer does once a step: norms, optimizer, its routers' counts "
        "and biases, in milliseconds; 0 for all layers: as long as it really takes.",
    )
    rank_factor: tuple[Positive, ...] = Field(
        default=(),
        description="Multiplies the time of each rank of a pipeline: 1.6 is a device that is "
        "1.6 times slower; empty: all 1. Real workers on CPUs with one thread compute on after each "
        "operation until it has taken so many times its CPU time (at least 1).",
    )
    latency_ms: Figure = Field(
        default=0.0,
        description="From the end of a transfer to its arrival, one way, in milliseconds.",
    )
    rate_gb_per_s: Positive | None = Field(
        default=None,
        description="Rate of a route between two ranks, in 10^9 bytes per second; null: no limit.",
    )
    output_mb: PerLayer = Field(
        default=0.0,
        description="What a layer hands on per micro-batch; its gradient has the same size, in "
        "10^6 bytes.",
    )
    gradient_mb: PerLayer = Field(
        default=0.0,
        description="Weight gradients of a layer, exchanged between its copies and replicas, in "
        "10^6 bytes.",
    )
    activation_mb: PerLayer = Field(
        default=0.0,
        description="What a layer holds for a micro-batch until its backward, in 10^6 bytes.",
    )
    state_mb: PerLayer = Field(
        default=0.0,
        description="Parameters, gradients and moments of a layer, per copy, in 10^6 bytes.",
    )
    memory_mb: tuple[Positive, ...] = Field(
        default=(),
        description="Memory of each rank of a pipeline, in 10^6 bytes; empty: enough.",
    )
