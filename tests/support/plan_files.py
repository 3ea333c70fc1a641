"""Plan files and results of profiles, small and made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepopt.convert import describe
from deepopt.job_file import load_job
from deepopt.launch.preparation import resolved
from deepopt.planner.plan_file import PipelineSection, PlanFile, StageSection
from deepopt.planner.plan_make import Measured, make_plan_file
from deepopt.planner.profile import (
    DeviceSection,
    HardwareSection,
    LayerSection,
    LayerSizes,
    LayerTimes,
    LinkSection,
    ModelSection,
    hardware_fingerprint,
)
from deepopt.planner.profile_result import hardware_section, layer_sections, model_section
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.device_identity import identify

LAYERS = ("embed", "blocks.0", "blocks.1", "blocks.2", "head")


def plan_file(**changes: Any) -> PlanFile:
    """Two ranks on a line, five layers, 1F1B of four micro-batches."""
    devices = tuple(
        DeviceSection(
            rank=rank, host="one", device="cuda", name="GPU", cores=8, memory_mb=1000.0
        )
        for rank in range(2)
    )
    times = LayerTimes(forward=1.0, input=2.0, weight=0.5, update=0.25, spread=0.1)
    sizes = LayerSizes(parameters=4.0, gradients=4.0, optimizer=8.0, activation=3.0, output=1.5)
    content: dict[str, Any] = {
        "format": 1,
        "made": "2026-11-24T12:00:00",
        "source": "measured",
        "model": ModelSection(
            factory="package.module:build",
            fingerprint="0123456789",
            parameters=1000,
            dtype="float32",
            recompute="none",
            microbatch_size=4,
            sequence_length=128,
            threads=1,
        ),
        "hardware": HardwareSection(
            fingerprint=hardware_fingerprint(devices),
            versions={"torch": "2.13.0"},
            exchange_us=100.0,
            devices=devices,
            links=(
                LinkSection(ranks=(0, 1), hosts=("one", "one"), latency_us=50.0, gb_per_s=3.0),
            ),
        ),
        "pipeline": PipelineSection(
            ranks=2,
            replicas=1,
            placement=PlacementKind.LINE,
            schedule="1f1b",
            microbatches=4,
            groups=2,
        ),
        "stages": (
            StageSection(first="embed", last="blocks.0", ranks=(0,)),
            StageSection(first="blocks.1", last="head", ranks=(1,)),
        ),
        "layers": (
            LayerSection(name="embed", kind="Embedding", times_ms=times, sizes_mb=sizes),
            LayerSection(name="blocks.0", kind="Block", times_ms=times, sizes_mb=sizes),
            *(
                LayerSection(name=name, kind="Block", like="blocks.0")
                for name in ("blocks.1", "blocks.2")
            ),
            LayerSection(name="head", kind="Head", times_ms=times, sizes_mb=sizes),
        ),
    }
    return PlanFile(**{**content, **changes})


def rank_result(*, factor: float = 1.0, **device: Any) -> dict[str, Any]:
    """What one worker measured of three layers, the last two alike."""
    trial = {
        "forward_s": [0.001 * factor] * 3,
        "input_s": [0.002 * factor] * 3,
        "weight_s": [0.001 * factor] * 3,
        "update_s": [0.0005 * factor] * 3,
        "activation_bytes": 2_000_000,
        "input_bytes": 500_000,
        "output_bytes": 500_000,
    }
    line = {"alpha_s": 1e-4, "beta_s": 2.5e-10, "error": 0.1}
    return {
        "device": {
            "host": "one",
            "device": "cuda",
            "name": "GPU",
            "cores": 8,
            "memory_bytes": 10**9,
            "versions": {"torch": "2.13.0", "python": "3.11.7"},
            **device,
        },
        "like": [0, 1, 1],
        "batch_s": 0.0001,
        "checks": {"1": 0.02},
        "trials": {"0": trial, "1": trial},
        "links": {"0-1": {"wall": line, "thread": line, "process": line}},
        "exchange_s": 0.0002,
    }


def plan_file_of(job_file: Path, **device: Any) -> PlanFile:
    """A plan for a job of two workers on this machine, from made-up times.

    Args:
        job_file: its path; relative paths and imports start in the working directory.
        device: figures that are other than those of this machine.
    """
    job = resolved(load_job(job_file, []))
    skeleton = describe(job)
    found = {**identify(job, torch.device("cpu")).to_json(), **device}
    result = rank_result(**found)
    result |= {"like": [0] * len(skeleton.layers), "links": {}}
    results = [result, result]
    measured = Measured(
        source="measured",
        model=model_section(job, skeleton),
        hardware=hardware_section(results, shared_cores=None),
        layers=layer_sections(results, job=job, skeleton=skeleton),
    )
    return make_plan_file(measured, job=job, skeleton=skeleton)
