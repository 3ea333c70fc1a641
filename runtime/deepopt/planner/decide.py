"""From a job, a model's skeleton and a number of workers to a plan: resolves every `auto`.

A pure function of its arguments; nothing is measured here and no tensor is touched. It refuses
what cannot work, with the values and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.choose import (
    LAUNCH_EFFORT,
    SEARCHED,
    Candidate,
    Comparison,
    compare,
    searches,
)
from deepopt.planner.estimate import estimated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import KeptOrder, Known, input_key
from deepopt.planner.plan import Plan
from deepopt.planner.shapes import SHAPES, Shape, fit_boundaries
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import Direction, PlacementKind, Schedule

_AUTO = "auto"
FILE = "file:"
"""`pipeline.schedule` starts with it where the job brings its order along."""
_PREFERENCE = (PlacementKind.MIRROR, PlacementKind.LINE, PlacementKind.V)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan and what led to it.

    Args:
        plan: who does what.
        schedules: the order of each replica.
        costs: what the layers were taken to cost.
        comparison: what a searched plan was chosen from; None where the job names the schedule, or
            there is one rank.
        orders: by key, the orders that no builder makes from their name: those of the plan, and what
            else was searched for it.
    """

    plan: Plan
    schedules: tuple[Schedule, ...]
    costs: LayerCosts
    comparison: Comparison | None
    orders: Mapping[str, KeptOrder] = field(default_factory=dict)


def make_plan(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    num_workers: int,
    plan_id: int,
    costs: LayerCosts | None = None,
    cores: int | None = None,
    effort: int = LAUNCH_EFFORT,
    given: Schedule | None = None,
    known: Known | None = None,
) -> Planned:
    """Decide who holds which layers and in which order they work.

    Schedule `auto` is searched, over every placement that the job leaves open; a named one is
    built, on the first placement of mirror, line and v that fits.

    Args:
        job: the resolved job.
        skeleton: the model's layers.
        num_workers: workers of the whole job.
        plan_id: number of this plan in the job.
        costs: of the layers; None to estimate them from the skeleton.
        cores: host cores that the workers share; None where each has a device or core of its own.
        effort: of the search, see `choose.compare`.
        given: the order that the job brings along (`file:ORDER.csv`), verified; None where
            `pipeline.schedule` names a builder or is auto.
        known: orders that were searched before, by their keys.

    Raises:
        PlanError: workers, layers, groups, placement or schedule do not fit together.
    """
    pipeline_size = _pipeline_size(job, num_workers)
    num_groups = resolve_groups(job)
    costs = costs or estimated_costs(job, skeleton)
    if given is not None:
        return _given(job, skeleton, given, costs=costs, ranks=pipeline_size, plan_id=plan_id)
    name = _named_schedule(job)
    problems: list[tuple[Shape, PlanError]] = []
    plans: list[tuple[Shape, Plan]] = []
    for shape in _shapes(job, name, pipeline_size):
        try:
            _check_groups(shape.kind, num_groups, job.parallel.data)
            boundaries = _boundaries(job, costs, shape, pipeline_size)
            plan = Plan(
                plan_id=plan_id,
                layer_names=tuple(layer.name for layer in skeleton.layers),
                boundaries=boundaries,
                placement=shape.kind,
                schedule=name or SEARCHED,
                pipeline_size=pipeline_size,
                data_size=job.parallel.data,
                num_microbatches=job.training.microbatches,
                num_groups=num_groups,
            )
            if name and (problem := misfit(name, placement=plan.make_placement())):
                raise PlanError(problem[0], remedy=problem[1])
        except PlanError as problem:
            problems.append((shape, problem))
            continue
        if name is not None:
            return _built(plan, costs)
        plans.append((shape, plan))
    if not plans:
        raise problems[-1][1]
    planned = _searched(job, plans, costs=costs, cores=cores, effort=effort, known=known)
    if planned.comparison is None:
        return planned
    unfit = tuple((Candidate(shape=shape), problem.message) for shape, problem in problems)
    left_out = unfit + planned.comparison.left_out
    return replace(planned, comparison=replace(planned.comparison, left_out=left_out))


def _built(plan: Plan, costs: LayerCosts) -> Planned:
    placement = plan.make_placement()
    schedules = tuple(
        build(plan.schedule, placement=placement, directions=plan.directions(index))
        for index in range(plan.data_size)
    )
    return Planned(plan=plan, schedules=schedules, costs=costs, comparison=None)


def _given(
    job: JobConfig,
    skeleton: ModelSkeleton,
    order: Schedule,
    *,
    costs: LayerCosts,
    ranks: int,
    plan_id: int,
) -> Planned:
    """The plan of an order that somebody made, which has to fit the job as it is."""
    source = job.pipeline.schedule.removeprefix(FILE)
    placement = order.placement
    if placement.num_ranks != ranks:
        raise PlanError(
            f"the order {source} is for {placement.num_ranks} ranks, a pipeline of this job has "
            f"{ranks}",
            remedy=f"use --workers {placement.num_ranks * job.parallel.data}, another order, or "
            "--set pipeline.schedule=auto",
        )
    if job.pipeline.placement not in (_AUTO, placement.kind):
        raise PlanError(
            f"the order {source} is for placement {placement.kind}, the job asks for "
            f"pipeline.placement {job.pipeline.placement}",
            remedy="leave out pipeline.placement",
        )
    explicit = job.pipeline.boundaries
    if explicit is not None and len(explicit) != placement.num_stages:
        raise PlanError(
            f"the order {source} is for {placement.num_stages} stages, pipeline.boundaries cuts "
            f"{len(explicit)}",
            remedy="leave out pipeline.boundaries",
        )
    num_groups = resolve_groups(job)
    _check_groups(placement.kind, num_groups, job.parallel.data)
    lanes = placement.num_stages // ranks
    plan = Plan(
        plan_id=plan_id,
        layer_names=tuple(layer.name for layer in skeleton.layers),
        boundaries=_boundaries(
            job, costs, Shape(kind=placement.kind, stages_per_rank=lanes), ranks
        ),
        placement=placement.kind,
        schedule=order.name,
        pipeline_size=ranks,
        data_size=job.parallel.data,
        num_microbatches=job.training.microbatches,
        num_groups=num_groups,
    )
    for index in range(plan.data_size):
        if (wanted := plan.directions(index)) != order.directions:
            raise PlanError(
                f"the order {source} is for {_ways(order.directions)}, replica {index} of this "
                f"job has {_ways(wanted)}",
                remedy="change training.microbatches, training.groups or the order; micro-batches "
                "of the first half of a replica's groups go down",
            )
    key = input_key({"rows": [[str(action) for action in row] for row in order.actions]})
    return Planned(
        plan=replace(plan, orders=(key,) * plan.data_size),
        schedules=(order,) * plan.data_size,
        costs=costs,
        comparison=None,
        orders={key: KeptOrder(schedule=order, boundaries=plan.boundaries)},
    )


def _ways(directions: Sequence[Direction]) -> str:
    """Micro-batches by direction: `8 micro-batches`, `micro-batches dddduuuu`."""
    if Direction.UP not in directions:
        return f"{len(directions)} micro-batches that go down"
    letters = "".join(direction[0] for direction in directions)
    return f"{len(directions)} micro-batches that go {letters} (d down, u up)"


def _searched(
    job: JobConfig,
    plans: Sequence[tuple[Shape, Plan]],
    *,
    costs: LayerCosts,
    cores: int | None,
    effort: int,
    known: Known | None,
) -> Planned:
    """The fastest of the placements that fit."""
    first = plans[0][1]
    if (
        first.num_stages == 1 and first.placement is PlacementKind.LINE
    ):  # one rank does the same work in any order
        return _built(replace(first, schedule="1f1b"), costs)
    pipeline = Pipeline(
        num_ranks=first.pipeline_size,
        replicas=tuple(
            tuple(end - start for start, end in first.replica_groups(index))
            for index in range(first.data_size)
        ),
        layers=costs,
        capped_as_1f1b=True,
        boundaries=job.pipeline.boundaries,
        cores=cores,
        overlap=job.pipeline.overlap_steps,
    )
    comparison = compare(
        pipeline, tried=searches([shape for shape, _ in plans]), effort=effort, known=known
    )
    best = comparison.best
    plan = next(plan for shape, plan in plans if shape == best.shape)
    plan = replace(plan, boundaries=best.boundaries)
    names = {schedule.name for schedule in best.schedules}
    if len(names) == 1 and SEARCHED not in names:
        plan = replace(plan, schedule=names.pop())
    else:
        plan = replace(plan, orders=best.keys)
    return Planned(
        plan=plan,
        schedules=best.schedules,
        costs=costs,
        comparison=comparison,
        orders=comparison.orders,
    )


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
            + f"known: {_AUTO}, {', '.join(BUILDERS)}, {FILE}ORDER.csv",
        )
    return name


def _shapes(job: JobConfig, schedule: str | None, pipeline_size: int) -> Sequence[Shape]:
    """Placements to try, the best first; the last one's problem is the one told."""
    named = job.pipeline.placement
    if schedule is None:
        shapes = [s for s in SHAPES if named in (_AUTO, s.kind)]
        explicit = job.pipeline.boundaries
        if explicit is not None:
            fitting = [s for s in shapes if s.place(pipeline_size).num_stages == len(explicit)]
            shapes = fitting or shapes[:1]  # whose problem is told
        if pipeline_size == 1:
            return shapes[:1]
        # Line with one stage a rank last: where nothing fits, its problem is the simplest one.
        return sorted(shapes, key=lambda s: s.kind is PlacementKind.LINE and s == SHAPES[0])
    if named != _AUTO:
        kinds: Sequence[PlacementKind] = (PlacementKind(named),)
    else:
        fits = BUILDERS[schedule].placements
        kinds = [kind for kind in _PREFERENCE if kind in fits]
    explicit = job.pipeline.boundaries
    return [_shape_of(kind, schedule, explicit, pipeline_size) for kind in kinds]


def _shape_of(
    kind: PlacementKind, schedule: str, explicit: Sequence[int] | None, pipeline_size: int
) -> Shape:
    """A kind of placement with the stages a rank that boundaries or schedule ask for."""
    per_rank = 2 if kind is PlacementKind.V or schedule == "interleaved_1f1b" else 1
    if explicit is not None and kind is PlacementKind.LINE:
        per_rank = max(1, len(explicit) // pipeline_size)
    return Shape(kind=kind, stages_per_rank=per_rank)


def _check_groups(kind: PlacementKind, num_groups: int, data: int) -> None:
    copies = 2 if kind is PlacementKind.MIRROR else 1
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
    job: JobConfig, costs: LayerCosts, shape: Shape, pipeline_size: int
) -> tuple[int, ...]:
    """The first layer of each stage: as the job says, or by cost."""
    explicit = job.pipeline.boundaries
    if explicit is not None:
        _check_explicit(explicit, shape.kind, pipeline_size, costs.num_layers)
        return explicit
    return fit_boundaries(costs, shape, num_ranks=pipeline_size)


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
