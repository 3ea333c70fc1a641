"""`deepopt profile --devices 128xA100`: the same sections as a profile, from data sheets, for machines that
one does not have. Nothing is started and nothing is measured."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.errors import InputError
from deepopt.launch.preparation import resolved
from deepopt.launch.profiling import Profiled
from deepopt.pipeline.stage_experts import layers_with_routers
from deepopt.planner.hardware import Cluster
from deepopt.planner.plan_make import Measured
from deepopt.planner.profile_result import hardware_section, layer_sections, model_section
from deepopt.planner.transformer_costs import HOP_LATENCY_S, LINK_SHARE
from deepopt.worker.analytic_trial import count_layers


def analytic_profile(job: JobConfig, *, cluster: Cluster, efficiency: float) -> Profiled:
    """Count a job's layers for a cluster.

    Links have the latency and the share of NVLink's rate that docs/scale.md derives, and the network
    its vendor's rate; the exchange at the end of a step takes one latency.

    Args:
        job: with absolute paths; its import paths can be imported.
        cluster: what it would run on; all of it.
        efficiency: reached part of the vendor's compute and memory rates, in (0, 1].

    Raises:
        DeepoptError: the job emulates devices, does not fit the cluster or cannot be counted.
    """
    if job.worker.device == "emulated":
        raise InputError(
            "worker.device is emulated: its devices take stated times, nothing is to be counted",
            remedy="leave --devices out, or set worker.device=auto",
        )
    if job.training.batch_size is not None:
        raise InputError(
            f"training.batch_size {job.training.batch_size} leaves the micro-batches open, which "
            "takes measurements, and --devices measures nothing",
            remedy="set training.microbatches and training.microbatch_size instead",
        )
    count = cluster.num_gpus
    worker = job.worker.model_copy(update={"count": count})
    job = resolved(job.model_copy(update={"worker": worker}))
    skeleton = describe(job)
    if skeleton.num_fp8:
        raise InputError(
            f"{skeleton.num_fp8} linear maps compute in FP8, and --devices counts at the rate of "
            f"{job.precision.dtype}",
            remedy="set precision.fp8 to none, or measure: leave --devices out",
        )
    gpu = cluster.accelerator
    counted = count_layers(job, skeleton, accelerator=gpu, efficiency=efficiency)
    results: list[dict[str, Any]] = [
        {
            **counted,
            "device": {
                "host": f"host-{rank // gpu.gpus_per_host}",
                "device": "cuda",
                "name": gpu.device_name,
                "cores": 0,  # not known
                "memory_bytes": gpu.memory_bytes,
                "versions": {"python": platform.python_version(), "torch": version("torch")},
            },
            "links": {},
            "exchange_s": HOP_LATENCY_S,
        }
        for rank in range(count)
    ]
    if count > 1:
        results[0]["links"]["0-1"] = _link(gpu.link_bytes_per_s * LINK_SHARE)
    if count > gpu.gpus_per_host:
        results[0]["links"][f"0-{gpu.gpus_per_host}"] = _link(gpu.network_bytes_per_s)
    asked = counted["with_values"]
    values = (
        f" ({', '.join(asked)} and their like: on the CPU, with random values)" if asked else ""
    )
    measured = Measured(
        source="analytic",
        basis=f"operations and bytes counted on the meta device{values}, at {efficiency:g} of the "
        f"rates in the {gpu.source}",
        model=model_section(job, skeleton, routers=layers_with_routers(skeleton)),
        hardware=hardware_section(results, shared_cores=None),
        layers=layer_sections(results, job=job, skeleton=skeleton),
    )
    return Profiled(job=job, skeleton=skeleton, measured=measured, warnings=())


def _link(bytes_per_s: float) -> dict[str, Any]:
    free = {"alpha_s": 0.0, "beta_s": 0.0, "error": 0.0}
    wall = {"alpha_s": HOP_LATENCY_S, "beta_s": 1 / bytes_per_s, "error": 0.0}
    return {"wall": wall, "thread": free, "process": free}
