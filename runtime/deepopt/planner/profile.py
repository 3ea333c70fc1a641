"""What a profile found out: of the layers, of the devices and of the links between them. Pure data.

The sections of a plan file (`plan_file`) that are measured and not decided. Times are in milliseconds
and sizes in 10^6 bytes, as they stand in the file, so that what is read is what was written.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from deepopt.config_fields import Count, Figure, Index, Positive, Section, Text, refuse

MEGABYTE = 1e6
SAME_SPEED = 0.05
"""Devices whose factors differ by less count as equally fast: thread clocks scatter as much."""


class TieSection(Section):
    """Weights with two uses."""

    layers: tuple[Text, Text] = Field(description="The layers of both.")
    mb: Figure = Field(description="10^6 bytes of the gradient of one use.")


class ModelSection(Section):
    """Which model and which micro-batch the figures are of."""

    factory: Text = Field(description="Import path of the model's factory.")
    fingerprint: Text = Field(description="Hash of the layers' names, shapes and ties.")
    parameters: Index = Field(description="Elements of all parameters, tied ones once.")
    dtype: Text = Field(description="Format of compute.")
    fp8_linears: Index = Field(
        default=0, description="Linear maps that compute in FP8 (`precision.fp8`)."
    )
    recompute: Text = Field(description="`pipeline.recompute` of the job.")
    microbatch_size: Count = Field(description="Sequences of a micro-batch.")
    sequence_length: Count = Field(description="Tokens of a sequence.")
    threads: Count = Field(description="CPU threads of a worker.")
    routers: tuple[Text, ...] = Field(
        default=(), description="Layers with routers, whose counts copies sum once a step."
    )
    ties: tuple[TieSection, ...] = Field(
        default=(), description="Tied weights: holders of both uses sum their gradients."
    )


class DeviceSection(Section):
    """One worker's device."""

    rank: Index = Field(description="Rank in the world.")
    host: Text = Field(description="Name of its host.")
    device: Text = Field(description="`cpu`, `cuda` or `emulated`.")
    name: Text = Field(description="The product, for example `NVIDIA A100-SXM4-80GB`.")
    cores: Index = Field(default=0, description="CPU cores of the host that workers may use.")
    memory_mb: Figure = Field(description="Memory of the device; of a CPU, that of the host.")
    factor: Positive = Field(
        default=1.0, description="Time that it takes for the same work, in times of rank 0."
    )
    slowed: Positive = Field(
        default=1.0, description="`emulation.rank_factor` that a real worker was slowed by."
    )


class LinkSection(Section):
    """What a message between two workers takes: latency + bytes / rate."""

    ranks: tuple[Index, Index] = Field(description="The two workers that were measured.")
    hosts: tuple[Text, Text] = Field(description="Their hosts.")
    latency_us: Figure = Field(description="One way, for a message of no bytes.")
    gb_per_s: Positive | None = Field(default=None, description="Rate; none for no limit.")
    cpu_us: Figure = Field(
        default=0.0, description="CPU time of a message at each end, in the worker's thread."
    )
    core_us: Figure = Field(
        default=0.0, description="CPU time of a message at each end, in all of its threads."
    )
    core_gb_per_s: Positive | None = Field(
        default=None, description="Bytes that a core moves; none for no limit."
    )
    error: Figure = Field(default=0.0, description="Largest relative distance from the fit.")


class BackgroundSection(Section):
    """What runs on a host beside the training: CPU seconds in a second, so cores on average."""

    host: Text = Field(description="Name of the host.")
    processes: Figure = Field(description="Of deepopt's head and of Ray.")
    threads: Figure = Field(
        description="Of the workers' threads beside those that train, all workers together."
    )


class HardwareSection(Section):
    """What the figures were measured on."""

    fingerprint: Text = Field(description="Hash of the devices.")
    versions: dict[str, str] = Field(default_factory=dict, description="Of what ran there.")
    shared_cores: Count | None = Field(
        default=None,
        description="Cores that all workers share; none where each has its own and some are left.",
    )
    exchange_us: Figure = Field(
        default=0.0, description="The exchange of norms and losses at the end of a step."
    )
    background: tuple[BackgroundSection, ...] = Field(
        default=(),
        description="Beside the training, by host; taken from cores that workers share.",
    )
    devices: Annotated[tuple[DeviceSection, ...], Field(min_length=1)]
    links: tuple[LinkSection, ...] = ()

    @model_validator(mode="after")
    def _ranks_in_order(self) -> Self:
        ranks = [device.rank for device in self.devices]
        if ranks != list(range(len(ranks))):
            refuse(
                f"the devices are those of ranks {ranks}",
                remedy="give each rank from 0 on one device, in order",
                fields=("devices",),
            )
        return self


class LayerTimes(Section):
    """Milliseconds of one micro-batch on the device of rank 0."""

    forward: Figure
    input: Figure
    weight: Figure
    prepare: Figure = 0.0
    update: Figure = 0.0
    warm_up: Figure = Field(
        default=0.0, description="By how much F is longer while the layer's routers warm up."
    )
    spread: Figure = Field(
        default=0.0, description="Distance of the quartiles of the measurements, in medians."
    )


class LayerSizes(Section):
    """10^6 bytes."""

    parameters: Figure = 0.0
    gradients: Figure = 0.0
    optimizer: Figure = 0.0
    activation: Figure = 0.0
    input: Figure = 0.0
    output: Figure = 0.0


class LayerSection(Section):
    """One layer: its own figures, or those of an earlier layer that it is like."""

    name: Text
    kind: str = ""
    like: Text | None = None
    times_ms: LayerTimes | None = None
    sizes_mb: LayerSizes | None = None

    @model_validator(mode="after")
    def _has_figures(self) -> Self:
        if self.like is None and (self.times_ms is None or self.sizes_mb is None):
            refuse(
                f"layer {self.name} has no figures",
                remedy="give times_ms and sizes_mb, or `like` and the name of an earlier layer",
                fields=("times_ms", "sizes_mb"),
            )
        return self


class PredictedSection(Section):
    """What one step will take, by simulation of the order of work."""

    step_ms: Figure | None = Field(description="None where the costs are no seconds.")
    range_ms: tuple[Figure, Figure] | None = Field(
        default=None, description="With all layers at the quartiles of their measurements."
    )
    warm_up_ms: Figure = Field(
        default=0.0, description="By how much it is longer while all routers warm up."
    )
    bubble: Annotated[float, Strict(), Field(ge=0, le=1)]
    gap: Figure | None = Field(default=None, description="How far above the lower bound.")
    stage_ms: tuple[Figure, ...] = Field(description="Compute of each stage a micro-batch.")
    memory_mb: tuple[Figure, ...] = Field(description="Peak of each pipeline rank.")


Source = Literal["measured", "emulated", "analytic"]


def hardware_fingerprint(devices: tuple[DeviceSection, ...]) -> str:
    """Hash of what devices there are, in the order of ranks; names of hosts do not count.

    Args:
        devices: of all workers.
    """
    kinds = [(one.device, one.name, one.cores) for one in devices]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:16]
