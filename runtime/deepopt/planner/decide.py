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
    YARDSTICK,
    Comparison,
    compare,
    evaluate,
    searches,
)
from deepopt.planner.cut import Freedom
from deepopt.planner.estimate import estimated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import KeptOrder, Known, input_key
from deepopt.planner.outcome import SEARCHED, Candidate, Outcome
from deepopt.planner.plan import Plan
from deepopt.planner.shapes import SHAPES, Shape, check_layers
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.builders import BUILDERS, misfit
from deepopt.schedule.ir import Direction, PlacementKind, Schedule, group_bounds

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
        gap: how far the busiest rank's work may be above the least of any cut of this placement, as
            a share of it; 0 where the cut is the best there is.
    """

    plan: Plan
    schedules: tuple[Schedule, ...]
    costs: LayerCosts
    comparison: Comparison | None
    orders: Mapping[str, KeptOrder] = field(default_factory=dict)
    gap: float = 0.0


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
    shapes: list[Shape] = []
    for shape in _shapes(job, name, pipeline_size):
        try:
            _check_groups(shape.kind, num_groups, job.parallel.data)
            check_layers(costs, shape, num_ranks=pipeline_size)
            placement = shape.place(pipeline_size)
            if job.pipeline.boundaries is not None:
                _check_explicit(
                    job.pipeline.boundaries, shape.kind, pipeline_size, costs.num_layers
                )
            if name and (problem := misfit(name, placement=placement)):
                raise PlanError(problem[0], remedy=problem[1])
        except PlanError as problem:
            problems.append((shape, problem))
            continue
        shapes.append(shape)
    if not shapes:
        raise problems[-1][1]
    single = pipeline_size == 1 and shapes[0] == SHAPES[0]
    if name is None and single:  # one rank does the same work in any order
        name = YARDSTICK
    pipeline = Pipeline(
        num_ranks=pipeline_size,
        replicas=_replicas(job.training.microbatches, num_groups, job.parallel.data),
        layers=costs,
        capped_as_1f1b=name is None,
        boundaries=job.pipeline.boundaries,
        freedom=Freedom(
            recompute=job.pipeline.recompute == _AUTO, order=job.pipeline.boundaries is None
        ),
        cores=cores,
        overlap=job.pipeline.overlap_steps,
    )

    def planned(outcome: Outcome, comparison: Comparison | None) -> Planned:
        cut, names = outcome.cut, {schedule.name for schedule in outcome.schedules}
        assert cut is not None, "orders of a job have a cut"
        searched = SEARCHED in names or len(names) > 1
        plan = Plan(
            plan_id=plan_id,
            layer_names=tuple(layer.name for layer in skeleton.layers),
            boundaries=cut.boundaries,
            placement=outcome.shape.kind,
            schedule=SEARCHED if searched else outcome.schedule.name,
            pipeline_size=pipeline_size,
            data_size=job.parallel.data,
            num_microbatches=job.training.microbatches,
            num_groups=num_groups,
            orders=outcome.keys if searched else (),
            order=cut.order,
            recompute=cut.again if pipeline.freedom.recompute else None,
        )
        return Planned(
            plan=plan,
            schedules=outcome.schedules,
            costs=pipeline.layers.recomputing(cut.again),
            comparison=comparison,
            orders={} if comparison is None else comparison.orders,
            gap=max(0.0, cut.gap),
        )

    if name is not None:
        return planned(_named(pipeline, shapes, name), None)
    comparison = compare(pipeline, tried=searches(shapes), effort=effort, known=known)
    unfit = tuple((Candidate(shape=shape), problem.message) for shape, problem in problems)
    comparison = replace(comparison, left_out=unfit + comparison.left_out)
    return planned(comparison.best, comparison)


def _named(pipeline: Pipeline, shapes: Sequence[Shape], name: str) -> Outcome:
    """The order of a builder on the first placement that it fits on."""
    problems = []
    for shape in shapes:
        found = evaluate(
            pipeline, candidate=Candidate(shape=shape, schedule=name), effort=1, seed=0
        )
        if isinstance(found, Outcome):
            return found
        problems.append(f"{shape}: {found.reason}")
    raise PlanError(
        f"schedule {name} does not fit: {'; '.join(problems)}",
        remedy="use smaller micro-batches, more memory or ranks, pipeline.recompute auto, or "
        "pipeline.schedule auto",
    )


def _replicas(
    num_microbatches: int, num_groups: int, num_replicas: int
) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each group, by replica."""
    sizes = [end - start for start, end in group_bounds(num_microbatches, num_groups)]
    each = num_groups // num_replicas
    return tuple(tuple(sizes[r * each : (r + 1) * each]) for r in range(num_replicas))


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
    shape = Shape(kind=placement.kind, stages_per_rank=placement.num_stages // ranks)
    check_layers(costs, shape, num_ranks=ranks)
    if explicit is not None:
        _check_explicit(explicit, shape.kind, ranks, costs.num_layers)
    freedom = Freedom(recompute=job.pipeline.recompute == _AUTO)
    pipeline = Pipeline(
        num_ranks=ranks,
        replicas=_replicas(job.training.microbatches, num_groups, job.parallel.data),
        layers=costs,
        boundaries=explicit,
        freedom=freedom,
    )
    cut = pipeline.cuts(shape)[0]
    plan = Plan(
        plan_id=plan_id,
        layer_names=tuple(layer.name for layer in skeleton.layers),
        boundaries=cut.boundaries,
        recompute=cut.again if freedom.recompute else None,
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
        costs=costs.recomputing(cut.again),
        comparison=None,
        orders={key: KeptOrder(schedule=order, cut=None)},
        gap=max(0.0, cut.gap),
    )


def _ways(directions: Sequence[Direction]) -> str:
    """Micro-batches by direction: `8 micro-batches`, `micro-batches dddduuuu`."""
    if Direction.UP not in directions:
        return f"{len(directions)} micro-batches that go down"
    letters = "".join(direction[0] for direction in directions)
    return f"{len(directions)} micro-batches that go {letters} (d down, u up)"


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
