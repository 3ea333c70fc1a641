"""Whether a plan file fits a job and the machines at hand, and how two plan files differ. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.plan_file import PlanFile
from deepopt.planner.profile import BackgroundSection, DeviceSection
from deepopt.planner.profile_result import model_section
from deepopt.planner.skeleton import ModelSkeleton

_MOST_SHOWN = 4  # differences in an error


def check_fits(
    plan_file: PlanFile,
    *,
    job: JobConfig,
    skeleton: ModelSkeleton,
    devices: Sequence[DeviceSection] | None,
    num_workers: int,
    source: str,
) -> None:
    """Refuse a plan for another model, another micro-batch or other devices.

    Args:
        plan_file: the plan.
        job: the resolved job.
        skeleton: its model.
        devices: at hand, by rank; None where they are on hosts that cannot be asked yet.
        num_workers: of the job.
        source: path of the plan file.

    Raises:
        PlanError: shows the differences.
    """
    found = [*model_differences(plan_file, job=job, skeleton=skeleton)]
    if found:
        raise PlanError(
            f"{source} is a plan for another model: {_listed(found)}",
            remedy=f"make one for this job: deepopt profile JOB.yaml -o {source}",
        )
    planned = len(plan_file.hardware.devices)
    if planned != num_workers:
        raise PlanError(
            f"{source} is a plan for {planned} workers, the job has {num_workers}",
            remedy=f"use --workers {planned}, or profile with --workers {num_workers}",
        )
    if devices is None:
        return
    found = [*device_differences(plan_file.hardware.devices, devices)]
    if found:
        raise PlanError(
            f"{source} is a plan for other devices: {_listed(found)}",
            remedy=f"measure these devices: deepopt profile JOB.yaml -o {source}",
        )


def model_differences(
    plan_file: PlanFile, *, job: JobConfig, skeleton: ModelSkeleton
) -> Iterator[str]:
    """In what a job is not the one that a plan was made for, a phrase each.

    Args:
        plan_file: the plan.
        job: the resolved job.
        skeleton: its model.
    """
    before, now = plan_file.model, model_section(job, skeleton)
    names = [layer.name for layer in plan_file.layers]
    others = [layer.name for layer in skeleton.layers]
    if names != others:
        if len(names) != len(others):
            yield f"it has {len(names)} layers, the job's model {len(others)}"
        else:
            changed = [(a, b) for a, b in zip(names, others, strict=True) if a != b]
            yield f"its layer {changed[0][0]} is {changed[0][1]} in the job's model"
    elif before.fingerprint != now.fingerprint:
        yield (
            f"it has {before.parameters:,} parameters, the job's model {now.parameters:,}"
            if before.parameters != now.parameters
            else "parameters have other names, shapes or ties"
        )
    for name in (
        "dtype",
        "fp8_linears",
        "recompute",
        "microbatch_size",
        "sequence_length",
        "threads",
    ):
        if getattr(before, name) != getattr(now, name):
            yield f"{name} was {getattr(before, name)} and is {getattr(now, name)}"
    pipeline = plan_file.pipeline
    if pipeline.microbatches != job.training.microbatches:
        yield f"it has {pipeline.microbatches} micro-batches, the job {job.training.microbatches}"
    if pipeline.replicas != job.parallel.data:
        yield f"it has {pipeline.replicas} replica(s), the job parallel.data {job.parallel.data}"
    if job.training.groups is not None and pipeline.groups != job.training.groups:
        yield f"it has {pipeline.groups} gradient groups, the job {job.training.groups}"


def device_differences(
    planned: Sequence[DeviceSection], found: Sequence[DeviceSection]
) -> Iterator[str]:
    """In what devices are not those of a plan, a phrase each.

    Args:
        planned: of the plan.
        found: at hand.
    """
    for before, now in zip(planned, found, strict=True):
        if before.device != now.device:
            yield (
                f"rank {before.rank} is {now.device} ({now.name}), "
                f"planned {before.device} ({before.name})"
            )
            continue
        for name, words in (("name", "is"), ("cores", "has cores")):
            old, new = getattr(before, name), getattr(now, name)
            if old != new and (name != "cores" or old):  # a data sheet says nothing of cores
                yield f"rank {before.rank} {words} {new}, planned {old}"
                break


def plan_differences(first: PlanFile, second: PlanFile) -> Iterator[tuple[str, str, str]]:
    """How two plans differ: what, in the first, in the second.

    Args:
        first: a plan.
        second: another.
    """
    for section in ("model", "pipeline"):
        yield from _fields(section, getattr(first, section), getattr(second, section))
    if first.hardware.fingerprint != second.hardware.fingerprint:
        yield (
            "hardware",
            _device_words(first.hardware.devices),
            _device_words(second.hardware.devices),
        )
    speeds = [[d.factor for d in plan.hardware.devices] for plan in (first, second)]
    if speeds[0] != speeds[1]:
        yield "device factors", _numbers(speeds[0]), _numbers(speeds[1])
    beside = [_background_words(plan.hardware.background) for plan in (first, second)]
    if beside[0] != beside[1]:
        yield "cores taken beside the training", beside[0], beside[1]
    yield from _stage_differences(first, second)
    yield from _layer_differences(first, second)
    if first.predicted is not None and second.predicted is not None:
        yield from _fields("predicted", first.predicted, second.predicted)
    if first.orders != second.orders and first.pipeline == second.pipeline:
        yield (
            "orders",
            f"{_actions(first)} actions",
            f"{_actions(second)} actions, another order",
        )


def _stage_differences(first: PlanFile, second: PlanFile) -> Iterator[tuple[str, str, str]]:
    for stage in range(max(len(first.stages), len(second.stages))):
        words = [
            f"{plan.stages[stage].first} .. {plan.stages[stage].last}"
            if stage < len(plan.stages)
            else "-"
            for plan in (first, second)
        ]
        if words[0] != words[1]:
            yield f"stage {stage}", words[0], words[1]


def _layer_differences(first: PlanFile, second: PlanFile) -> Iterator[tuple[str, str, str]]:
    """Compute of all layers together, and layers that only one of them has."""
    if [x.name for x in first.layers] != [x.name for x in second.layers]:
        yield "layers", str(len(first.layers)), str(len(second.layers))
        return
    for op in ("forward", "input", "weight", "prepare", "update"):
        sums = [
            sum(getattr(times, op) for times, _ in plan.resolved()) for plan in (first, second)
        ]
        if sums[0] != sums[1]:
            yield f"{op} of all layers", f"{sums[0]:.2f} ms", f"{sums[1]:.2f} ms"


def _fields(section: str, first: object, second: object) -> Iterator[tuple[str, str, str]]:
    for name in type(first).model_fields:  # type: ignore[attr-defined]
        old, new = getattr(first, name), getattr(second, name)
        if old != new:
            yield (
                f"{section} {name.removesuffix('_ms').removesuffix('_mb')}",
                _word(old),
                _word(new),
            )


def _word(value: object) -> str:
    return _numbers(value) if isinstance(value, tuple) else f"{value}"


def _numbers(values: Sequence[object]) -> str:
    return " ".join(
        f"{value:.5g}" if isinstance(value, float) else f"{value}" for value in values
    )


def _background_words(background: Sequence[BackgroundSection]) -> str:
    found = [f"{own.processes + own.threads:.3f} of {own.host}" for own in background]
    return ", ".join(found) or "not measured"


def _actions(plan_file: PlanFile) -> int:
    return sum(len(row.split()) for rows in plan_file.orders for row in rows)


def _device_words(devices: Sequence[DeviceSection]) -> str:
    names = [device.name for device in devices]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _listed(found: Sequence[str]) -> str:
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return "; ".join(found[:_MOST_SHOWN]) + more
