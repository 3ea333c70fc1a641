"""What the workers of a profile measured, put together: the layers, devices and links of a plan file.

Pure. Several devices tried the same layers: their ratio is the speed of the devices, and what is left
after it the scatter of the measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from deepopt.config import JobConfig
from deepopt.errors import ClusterError
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.estimate import tied_layers
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.profile import (
    MEGABYTE,
    SAME_SPEED,
    BackgroundSection,
    DeviceSection,
    HardwareSection,
    LayerSection,
    LayerSizes,
    LayerTimes,
    LinkSection,
    ModelSection,
    TieSection,
    hardware_fingerprint,
)
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton

Result = Mapping[str, Any]
_OPS = ("forward_s", "input_s", "weight_s")
_MOMENT_BYTES = 8  # two moments in fp32
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MS, _US = 1e3, 1e6


def model_section(
    job: JobConfig, skeleton: ModelSkeleton, *, routers: Sequence[int] = ()
) -> ModelSection:
    """What the figures of a plan file are of.

    Args:
        job: the resolved job.
        skeleton: its model.
        routers: indices of the layers that have some.
    """
    return ModelSection(
        factory=skeleton.factory,
        fingerprint=skeleton.fingerprint(),
        parameters=skeleton.num_parameters,
        dtype=job.precision.dtype,
        fp8_linears=skeleton.num_fp8,
        recompute=job.pipeline.recompute,
        microbatch_size=job.training.microbatch_size,
        sequence_length=job.data.sequence_length,
        threads=job.worker.threads,
        routers=tuple(skeleton.layers[index].name for index in routers),
        ties=tuple(
            # A job that states the sizes of emulated layers states none for what they share.
            TieSection(
                layers=(skeleton.layers[first].name, skeleton.layers[second].name),
                mb=0.0 if job.worker.device == "emulated" else _megabytes(size),
            )
            for first, second, size in tied_layers(skeleton)
        ),
    )


def check_versions(results: Sequence[Result]) -> None:
    """Refuse workers that run different versions: their times and numbers are not of one program.

    Args:
        results: by rank.

    Raises:
        ClusterError: names the first difference.
    """
    first = results[0]["device"]
    for result in results[1:]:
        other = result["device"]
        for what, version in first["versions"].items():
            if other["versions"].get(what) != version:
                raise ClusterError(
                    f"host {first['host']} runs {what} {version}, host {other['host']} "
                    f"{other['versions'].get(what, 'none')}",
                    remedy="install the same versions on all hosts, then profile again",
                )


def factors(results: Sequence[Result]) -> tuple[float, ...]:
    """How many times as long as rank 0 each device takes for all layers; 1 where they scatter.

    CPU workers of one host share its cores: their differences are scatter, whatever they are, unless the
    job slows some of them.

    Args:
        results: by rank.
    """
    measured: dict[object, list[float]] = {}
    for rank, result in enumerate(results):
        measured.setdefault(_device_key(rank, result), []).append(_total_s(result))
    totals = [median(measured[_device_key(rank, one)]) for rank, one in enumerate(results)]
    ratios = [total / totals[0] if totals[0] > 0 else 1.0 for total in totals]
    middle = median(ratios)
    alike = all(abs(ratio / middle - 1) <= SAME_SPEED for ratio in ratios)
    return tuple(1.0 if alike else round(ratio, 3) for ratio in ratios)


def hardware_section(results: Sequence[Result], *, shared_cores: int | None) -> HardwareSection:
    """The devices and links of a profile.

    Args:
        results: by rank.
        shared_cores: cores that all workers share; None where each has a device of its own.
    """
    devices = tuple(
        DeviceSection(
            rank=rank,
            host=result["device"]["host"],
            device=result["device"]["device"],
            name=result["device"]["name"],
            cores=result["device"]["cores"],
            memory_mb=_megabytes(result["device"]["memory_bytes"]),
            factor=factor,
            slowed=result.get("slowed", 1.0),
        )
        for rank, (result, factor) in enumerate(zip(results, factors(results), strict=True))
    )
    links = [
        _link(name, trial, devices)
        for result in results
        for name, trial in result["links"].items()
    ]
    return HardwareSection(
        fingerprint=hardware_fingerprint(devices),
        versions=dict(results[0]["device"]["versions"]),
        shared_cores=shared_cores,
        background=_background(results),
        exchange_us=round(max(result["exchange_s"] for result in results) * _US, 2),
        devices=devices,
        links=tuple(sorted(links, key=lambda link: link.ranks)),
    )


def _background(results: Sequence[Result]) -> tuple[BackgroundSection, ...]:
    """What runs beside the training on each host where it was measured, by its workers."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if "background" in result:
            found.setdefault(result["device"]["host"], []).append(result["background"])
    return tuple(
        BackgroundSection(
            host=host,
            # Each worker has seen all of them.
            processes=round(median(own["processes"] for own in seen), 4),
            threads=round(sum(own["threads"] for own in seen), 4),
        )
        for host, seen in found.items()
    )


def layer_sections(
    results: Sequence[Result], *, job: JobConfig, skeleton: ModelSkeleton
) -> tuple[LayerSection, ...]:
    """The layers of a profile; those that are like an earlier one refer to it.

    Args:
        results: by rank.
        job: the resolved job.
        skeleton: its model.
    """
    speeds = factors(results)
    first = results[0]
    layers = skeleton.layers
    stated = None
    if job.worker.device == "emulated":
        stated = emulated_costs(job, num_layers=len(layers))
    batch_ms = 0.0 if stated else median(float(r["batch_s"]) for r in results) * _MS
    ends = {0, len(layers) - 1}  # which fetch the batch
    sections = []
    for index, layer in enumerate(layers):
        like = first["like"][index]
        if like != index:
            sections.append(
                LayerSection(name=layer.name, kind=layer.kind, like=layers[like].name)
            )
            continue
        trials = [result["trials"][str(index)] for result in results]

        def middle(op: str, trials: list[Any] = trials) -> float:
            own = zip(trials, speeds, strict=True)
            return float(_MS * median(median(trial[op]) / speed for trial, speed in own))

        forward = middle("forward_s") + (batch_ms if index in ends else 0.0)
        sections.append(
            LayerSection(
                name=layer.name,
                kind=layer.kind,
                times_ms=LayerTimes(
                    forward=_rounded(forward),
                    input=_rounded(middle("input_s")),
                    weight=_rounded(middle("weight_s")),
                    prepare=_rounded(forward) if job.pipeline.recompute != "none" else 0.0,
                    update=_rounded(middle("update_s")),
                    warm_up=_rounded(_warm_up_ms(trials, speeds)),
                    spread=round(_spread(trials[0]), 3),
                ),
                sizes_mb=_sizes(layer, trials[0], stated=stated, index=index),
            )
        )
    return tuple(sections)


def deviations(results: Sequence[Result], skeleton: ModelSkeleton) -> dict[str, float]:
    """How far a second layer of a repeated kind was from the first one, by the first one's name.

    Args:
        results: by rank.
        skeleton: the model.
    """
    found: dict[str, list[float]] = {}
    for result in results:
        for index, share in result["checks"].items():
            found.setdefault(skeleton.layers[int(index)].name, []).append(float(share))
    return {name: median(shares) for name, shares in found.items()}


def _device_key(rank: int, result: Result) -> object:
    """What is one device, as far as speed goes."""
    device = result["device"]
    if device["device"] != "cpu":
        return rank
    return device["host"], result.get("slowed", 1.0)


def _total_s(result: Result) -> float:
    """One micro-batch through the whole model on one device."""
    return float(
        sum(median(result["trials"][str(like)][op]) for like in result["like"] for op in _OPS)
    )


def _warm_up_ms(trials: Sequence[Result], speeds: Sequence[float]) -> float:
    """By how much F is longer while routers warm up."""
    own = zip(trials, speeds, strict=True)
    return float(_MS * median(trial.get("warm_up_s", 0.0) / speed for trial, speed in own))


def _spread(trial: Result) -> float:
    """Distance of the quartiles of all compute, in medians."""
    whole = [sum(parts) for parts in zip(*(trial[op] for op in _OPS), strict=True)]
    if len(whole) < 2 or median(whole) <= 0:
        return 0.0
    low, middle, high = quantiles(whole, n=4)
    return float((high - low) / middle)


def _sizes(
    layer: LayerSkeleton, trial: Result, *, stated: LayerCosts | None, index: int
) -> LayerSizes:
    if stated is not None:  # an emulated device has what the job says
        gradients = stated.gradient_bytes[index]
        return LayerSizes(
            parameters=_megabytes(max(0.0, stated.state_bytes[index] - gradients)),
            gradients=_megabytes(gradients),
            activation=_megabytes(stated.activation_bytes[index]),
            input=_megabytes(stated.input_bytes[index] if stated.input_bytes else 0.0),
            output=_megabytes(stated.output_bytes[index]),
        )
    own = [p for p in layer.parameters if p.tied_to is None]
    trained = sum(p.numel for p in layer.parameters if p.requires_grad)
    return LayerSizes(
        parameters=_megabytes(sum(p.numel * _BYTES.get(p.dtype, 4) for p in own)),
        gradients=_megabytes(4 * trained),
        optimizer=_megabytes(_MOMENT_BYTES * sum(p.numel for p in own if p.requires_grad)),
        activation=_megabytes(trial["activation_bytes"]),
        input=_megabytes(trial["input_bytes"]),
        output=_megabytes(trial["output_bytes"]),
    )


def _link(name: str, trial: Result, devices: Sequence[DeviceSection]) -> LinkSection:
    first, second = map(int, name.split("-"))
    wall, thread, process = trial["wall"], trial["thread"], trial["process"]
    return LinkSection(
        ranks=(first, second),
        hosts=(devices[first].host, devices[second].host),
        latency_us=round(wall["alpha_s"] * _US, 2),
        gb_per_s=_rate(wall["beta_s"]),
        cpu_us=round(thread["alpha_s"] * _US, 2),
        core_us=round(process["alpha_s"] * _US, 2),
        core_gb_per_s=_rate(process["beta_s"]),
        error=round(wall["error"], 3),
    )


def _rate(beta_s: float) -> float | None:
    return round(1e-9 / beta_s, 4) or None if beta_s > 0 else None


def _megabytes(num_bytes: float) -> float:
    return round(num_bytes / MEGABYTE, 6)


def _rounded(milliseconds: float) -> float:
    return round(milliseconds, 5)


def repeats(sections: Sequence[LayerSection]) -> list[tuple[LayerSection, int]]:
    """Layers in a row that have the same figures, as one and their number.

    Args:
        sections: in chain order.
    """
    keyed = itertools.groupby(sections, key=lambda layer: layer.like or layer.name)
    return [(run[0], len(run)) for run in (list(group) for _, group in keyed)]
