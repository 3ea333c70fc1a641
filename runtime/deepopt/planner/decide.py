"""From a job, a model's skeleton and a number of workers to a plan: resolves every `auto`.

A pure function of its arguments; nothing is measured here and no tensor is touched. It refuses
what cannot work, with the values and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.partition import partition, partition_folded
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.schedule.builders import BUILDERS, default_schedule, misfit
from deepopt.schedule.ir import PlacementKind

_AUTO = "auto"
_PREFERENCE = (PlacementKind.MIRROR, PlacementKind.LINE, PlacementKind.V)


def make_plan(
    job: JobConfig, skeleton: ModelSkeleton, *, num_workers: int, plan_id: int
) -> Plan:
    """Decide who holds which layers and in which order they work.

    Placement `auto` is line for one rank of a pipeline, else mirror where the gradient groups
    can be shared by two directions, else line; a named schedule or boundaries narrow the
    choice.

    Args:
        job: the resolved job.
        skeleton: the model's layers.
        num_workers: workers of the whole job.
        plan_id: number of this plan in the job.

    Raises:
        PlanError: workers, layers, groups, placement or schedule do not fit together.
    """
    pipeline_size = _pipeline_size(job, num_workers)
    num_groups = resolve_groups(job)
    schedule = _named_schedule(job)
    problems: list[PlanError] = []
    for kind in _candidates(job, schedule, pipeline_size):
        copies = 2 if kind is PlacementKind.MIRROR else 1
        try:
            _check_groups(kind, num_groups, copies, job.parallel.data)
            boundaries = _boundaries(job, skeleton, kind, schedule, pipeline_size)
        except PlanError as problem:
            problems.append(problem)
            continue
        plan = Plan(
            plan_id=plan_id,
            layer_names=tuple(layer.name for layer in skeleton.layers),
            boundaries=boundaries,
            placement=kind,
            schedule=schedule
            or default_schedule(kind, stages_per_rank=len(boundaries) // pipeline_size),
            pipeline_size=pipeline_size,
            data_size=job.parallel.data,
            num_microbatches=job.training.microbatches,
            num_groups=num_groups,
        )
        if problem_text := misfit(plan.schedule, placement=plan.make_placement()):
            problems.append(PlanError(problem_text[0], remedy=problem_text[1]))
            continue
        return plan
    raise problems[-1]


def resolve_groups(job: JobConfig) -> int:
    """The number of gradient groups of a step: what the job says, or min(2, micro-batches).

    Args:
        job: the job; its groups are fixed at the first launch.

    Raises:
        PlanError: more groups than micro-batches.
    """
    groups, microbatches = job.training.groups, job.training.microbatches
    if groups is None:
        return min(2, microbatches)
    if groups > microbatches:
        raise PlanError(
            f"{microbatches} micro-batches cannot form {groups} gradient groups",
            remedy="lower training.groups or raise training.microbatches",
        )
    return groups


def layer_costs(skeleton: ModelSkeleton) -> tuple[float, ...]:
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


def _pipeline_size(job: JobConfig, num_workers: int) -> int:
    data, pipeline = job.parallel.data, job.parallel.pipeline
    if num_workers < 1:
        raise PlanError(f"a job needs at least one worker, got {num_workers}")
    if pipeline is not None and pipeline * data != num_workers:
        raise PlanError(
            f"parallel.pipeline {pipeline} x parallel.data {data} makes {pipeline * data} "
            f"workers, the job has {num_workers}",
            remedy=f"use --workers {pipeline * data}, or leave parallel.pipeline out to take "
            "workers / parallel.data",
        )
    if num_workers % data:
        lower, upper = num_workers // data * data, -(-num_workers // data) * data
        choices = " or ".join(str(n) for n in (lower, upper) if n)
        raise PlanError(
            f"{num_workers} workers cannot form {data} replicas of equal size (parallel.data)",
            remedy=f"use --workers {choices}, or a parallel.data that divides {num_workers}",
        )
    return num_workers // data


def _named_schedule(job: JobConfig) -> str | None:
    name = job.pipeline.schedule
    if name == _AUTO:
        return None
    if name not in BUILDERS:
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        raise PlanError(
            f"pipeline.schedule {name!r} is not a schedule",
            remedy=(f"did you mean {close[0]!r}? " if close else "")
            + f"known: {_AUTO}, {', '.join(BUILDERS)}",
        )
    return name


def _candidates(
    job: JobConfig, schedule: str | None, pipeline_size: int
) -> Sequence[PlacementKind]:
    """Kinds of placement to try, the best first; the last one's problem is the one told."""
    if job.pipeline.placement != _AUTO:
        return (PlacementKind(job.pipeline.placement),)
    if schedule is not None:
        fitting = BUILDERS[schedule].placements
        return [kind for kind in _PREFERENCE if kind in fitting]
    if pipeline_size == 1:
        return (PlacementKind.LINE,)
    return (PlacementKind.MIRROR, PlacementKind.LINE)


def _check_groups(kind: PlacementKind, num_groups: int, copies: int, data: int) -> None:
    if num_groups % (copies * data):
        directions = f" of {copies} directions" if copies > 1 else ""
        raise PlanError(
            f"{num_groups} gradient groups cannot be shared by {data} replica(s){directions} "
            f"with placement {kind}",
            remedy=f"set training.groups to a multiple of {copies * data}, with at least as "
            "many training.microbatches (groups are fixed at the first launch), or choose "
            "another pipeline.placement or parallel.data",
        )


def _boundaries(
    job: JobConfig,
    skeleton: ModelSkeleton,
    kind: PlacementKind,
    schedule: str | None,
    pipeline_size: int,
) -> tuple[int, ...]:
    """The first layer of each stage: as the job says, or by cost."""
    num_layers = len(skeleton.layers)
    explicit = job.pipeline.boundaries
    if explicit is not None:
        _check_explicit(explicit, kind, pipeline_size, num_layers)
        return explicit
    per_rank = 2 if kind is PlacementKind.V or schedule == "interleaved_1f1b" else 1
    num_stages = per_rank * pipeline_size
    if num_stages > num_layers:
        stages = f"{num_stages} stages" + (f" ({per_rank} a rank)" if per_rank > 1 else "")
        raise PlanError(
            f"{stages} need at least {num_stages} layers, the model has {num_layers}",
            remedy=f"use at most {num_layers // per_rank or 1} worker(s) per pipeline, "
            "more replicas (parallel.data), or a deeper model",
        )
    costs = layer_costs(skeleton)
    if kind is PlacementKind.LINE:
        return partition(costs, num_stages)
    return partition_folded(costs, num_stages)


def _check_explicit(
    boundaries: tuple[int, ...], kind: PlacementKind, pipeline_size: int, num_layers: int
) -> None:
    num_stages = len(boundaries)
    if boundaries[-1] >= num_layers:
        raise PlanError(
            f"pipeline.boundaries {list(boundaries)} starts a stage at layer {boundaries[-1]}, "
            f"the model has {num_layers} layers",
            remedy=f"stay below {num_layers}, or leave pipeline.boundaries out",
        )
    wanted = {
        PlacementKind.LINE: f"a multiple of {pipeline_size}",
        PlacementKind.V: str(2 * pipeline_size),
        PlacementKind.MIRROR: str(pipeline_size),
    }[kind]
    fits = {
        PlacementKind.LINE: num_stages % pipeline_size == 0,
        PlacementKind.V: num_stages == 2 * pipeline_size,
        PlacementKind.MIRROR: num_stages == pipeline_size,
    }[kind]
    if not fits:
        raise PlanError(
            f"pipeline.boundaries cuts {num_stages} stages; placement {kind} on "
            f"{pipeline_size} rank(s) takes {wanted}",
            remedy="change or leave out pipeline.boundaries, or change the number of workers",
        )
