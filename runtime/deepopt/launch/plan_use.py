"""Takes a job's stages, order and costs from a plan file, if that fits the job and the machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deepopt.config import JobConfig
from deepopt.errors import InputError, PlanError
from deepopt.planner.decide import Planned
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import KeptOrder
from deepopt.planner.plan_check import check_fits
from deepopt.planner.plan_file import PlanFile
from deepopt.planner.plan_text import read_plan_file
from deepopt.planner.profile import MEGABYTE, DeviceSection
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker.device import choose_device
from deepopt.worker.device_identity import identify


def load_plan_file(path: Path) -> PlanFile:
    """Read a plan file and check it in itself.

    Args:
        path: of the file.

    Raises:
        InputError: it cannot be read, or is wrong, with file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text", remedy="save it as UTF-8") from error
    except OSError as error:
        raise InputError(
            f"plan file {path} cannot be read: {error.strerror}",
            remedy=f"`deepopt profile JOB.yaml -o {path}` writes one",
        ) from error
    return read_plan_file(text, source=str(path))


def use_plan_file(
    path: Path, *, asked: JobConfig, job: JobConfig, skeleton: ModelSkeleton, plan_id: int
) -> tuple[JobConfig, Planned]:
    """What a plan file says of a job.

    Args:
        path: of the plan file.
        asked: the job as written: groups that it leaves open are those of the plan.
        job: the job, resolved.
        skeleton: its model.
        plan_id: number of the plan in the job.

    Returns:
        The job with the plan's gradient groups, and the plan.

    Raises:
        InputError: the file is wrong, or made for another model or other devices.
    """
    plan_file = load_plan_file(path)
    assert job.worker.count is not None, "a resolved job has a number of workers"
    check_fits(
        plan_file,
        job=asked,
        skeleton=skeleton,
        devices=_devices_here(job),
        num_workers=job.worker.count,
        source=str(path),
    )
    groups = plan_file.pipeline.groups
    training = job.training.model_copy(update={"groups": groups})
    plan, schedules = plan_file.plan(plan_id=plan_id), plan_file.schedules()
    orders = zip(plan.orders, schedules, strict=True) if plan.orders else ()
    planned = Planned(
        plan=plan,
        schedules=schedules,
        costs=_costs_here(plan_file, job=job),
        comparison=None,
        orders={key: KeptOrder(schedule=order, cut=None) for key, order in orders},
    )
    return job.model_copy(update={"training": training}), planned


def _costs_here(plan_file: PlanFile, *, job: JobConfig) -> LayerCosts:
    if job.worker.device != "emulated":
        return as_slowed(plan_file, factors=job.emulation.rank_factor).costs()
    costs = plan_file.costs()
    # Emulated devices are as fast as this job says, whatever those were that the plan was made for.
    stated = emulated_costs(job, num_layers=costs.num_layers)
    return replace(costs, rank_factor=stated.rank_factor)


def as_slowed(plan_file: PlanFile, *, factors: Sequence[float]) -> PlanFile:
    """A plan file with devices as fast as a job says, whatever those were slowed by that it was made for.

    Args:
        plan_file: says what its devices were slowed by.
        factors: `emulation.rank_factor` of the job, of real workers; empty: none is slowed.
    """
    hardware = plan_file.hardware
    ranks = plan_file.pipeline.ranks
    now = [factors[one.rank % ranks] if factors else 1.0 for one in hardware.devices]
    devices = tuple(
        one.model_copy(update={"factor": one.factor * own / one.slowed, "slowed": own})
        for one, own in zip(hardware.devices, now, strict=True)
    )
    return plan_file.model_copy(
        update={"hardware": hardware.model_copy(update={"devices": devices})}
    )


def _devices_here(job: JobConfig) -> tuple[DeviceSection, ...] | None:
    """The devices of a job that runs on this machine alone; None for other hosts."""
    if job.cluster.address is not None or job.cluster.hostfile is not None:
        return None
    found = identify(job, choose_device(job))
    return tuple(
        DeviceSection(
            rank=rank,
            host=found.host,
            device=found.device,
            name=found.name,
            cores=found.cores,
            memory_mb=round(found.memory_bytes / MEGABYTE, 6),
        )
        for rank in range(job.worker.count or 1)
    )
