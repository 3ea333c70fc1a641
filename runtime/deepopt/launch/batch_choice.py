"""Settles the micro-batches of a job that gives only `training.batch_size`: measures, then decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deepopt.config import JobConfig
from deepopt.errors import PlanError

if TYPE_CHECKING:
    from deepopt.planner.layer_costs import LayerCosts
    from deepopt.planner.microbatch_count import TriedCount
    from deepopt.planner.skeleton import ModelSkeleton


def with_microbatches(
    job: JobConfig, *, num_workers: int, cores: int | None, plan_file: Path | None = None
) -> tuple[JobConfig, tuple[TriedCount, ...]]:
    """The job with the number and size of its micro-batches.

    Args:
        job: with absolute paths.
        num_workers: of the job.
        cores: that all workers share; None where each has a device of its own.
        plan_file: was made for a number: it is taken.

    Returns:
        The job, and what was tried; nothing where the job or the plan file says it.

    Raises:
        PlanError: it cannot be measured here, or nothing fits.
    """
    batch_size = job.training.batch_size
    if batch_size is None:
        return job, ()
    from deepopt.planner.microbatch_count import choose_count, with_count

    if plan_file is not None:
        return with_count(job, _count_of(plan_file, batch_size=batch_size)), ()
    elsewhere = job.cluster.address is not None or job.cluster.hostfile is not None
    if elsewhere or job.worker.device == "emulated" or job.data.dataset is not None:
        why = (
            "the workers run on other machines"
            if elsewhere
            else "times of emulated layers are stated for one size"
            if job.worker.device == "emulated"
            else "data comes from data.dataset, whose batches have one size"
        )
        raise PlanError(
            f"training.batch_size {batch_size} leaves the micro-batches open, and they cannot be "
            f"tried before the launch: {why}",
            remedy="set training.microbatches and training.microbatch_size instead",
        )
    from deepopt.convert import describe
    from deepopt.datasets.batch_source import build_batch_source
    from deepopt.worker.calibrate import calibrate, with_messages
    from deepopt.worker.company import company, num_companions
    from deepopt.worker.device import choose_device
    from deepopt.worker.device_identity import identify

    skeleton: ModelSkeleton = describe(job)
    device = choose_device(job)

    def costs_of(sized: JobConfig) -> LayerCosts | None:
        batches = build_batch_source(sized, run_dir=None)
        found = calibrate(sized, skeleton, batches=batches, device=device)
        if found is None:
            return None
        if device.type == "cuda":
            memory = float(identify(job, device).memory_bytes)
            found = replace(found, memory_bytes=(memory,) * (num_workers // job.parallel.data))
        return with_messages(found, job=sized, num_workers=num_workers, cores=cores)

    others = num_companions(num_workers, threads=job.worker.threads)
    with company(others if device.type == "cpu" else 0):
        return choose_count(
            job, skeleton, num_workers=num_workers, cores=cores, costs_of=costs_of
        )


def _count_of(path: Path, *, batch_size: int) -> int:
    """The micro-batches that a plan file was made for."""
    from deepopt.launch.plan_use import load_plan_file

    found = load_plan_file(path)
    count, size = found.pipeline.microbatches, found.model.microbatch_size
    if count * size != batch_size:
        raise PlanError(
            f"{path} is a plan for {count} micro-batches of {size} sequences, the job has "
            f"training.batch_size {batch_size}",
            remedy=f"make one for this job: deepopt profile JOB.yaml -o {path}",
        )
    return count
