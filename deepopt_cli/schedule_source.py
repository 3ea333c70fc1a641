"""Where an order is from: options alone, a job file, a run directory, or a CSV file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepopt.errors import InputError, ScheduleError
from deepopt.planner.choose import compare, evaluate, searches, yardstick
from deepopt.planner.order_files import find_order_fault, read_order
from deepopt.planner.outcome import SEARCHED, Candidate, Misfit, Outcome, judge
from deepopt.planner.shapes import SHAPES, Shape
from deepopt.planner.sketch import Pipeline, stage_cap, two_groups
from deepopt.schedule.builders import BUILDERS
from deepopt.schedule.ir import PlacementKind, Schedule
from deepopt.schedule.simulate import CostTable
from deepopt.schedule.verify import verify
from deepopt_cli.schedule_options import MOST_STAGES_PER_RANK, PipelineOptions
from deepopt_cli.schedule_subject import Progress, plan_of

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which order of a pipeline is wanted, where nothing else says so.

    Args:
        placement: line, v, mirror or auto.
        schedule: a builder or auto.
        stages_per_rank: of placement line; None where not said.
        effort: of each search.
        seed: of each search.
    """

    placement: str
    schedule: str
    stages_per_rank: int | None
    effort: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An order and what it is compared with.

    Args:
        outcome: the order and its figures.
        yardstick: 1F1B for the same pipeline; None where it cannot be had.
        has_unit: the costs are seconds.
        origin: where the order is from, in words.
    """

    outcome: Outcome
    yardstick: Outcome | None
    has_unit: bool
    origin: str


def shown(
    source: Path | None,
    *,
    from_csv: Path | None,
    options: PipelineOptions,
    choice: Choice,
    progress: Progress,
) -> Shown:
    """Find the order that is asked for.

    Args:
        source: a job file, run directory or CSV file; None for the options alone.
        from_csv: a CSV file of any name.
        options: sizes and costs.
        choice: which order, for the options alone.
        progress: told what is being searched.

    Raises:
        DeepoptError: what is wrong, with the values.
    """
    if source is not None and from_csv is not None:
        raise InputError(
            f"{source} and --from-csv {from_csv} are two sources", remedy="give one of them"
        )
    if from_csv is None and source is not None and source.suffix == ".csv":
        from_csv = source
    if from_csv is not None:
        if options.cluster is not None:
            options.refuse_without_costs(of=str(from_csv))
        _refuse_choice(choice, of=from_csv)
        return _of_csv(from_csv, options)
    if source is not None:
        _refuse_choice(choice, of=source)
        return _of_plan(source, options)
    return _of_options(options, choice, progress)


def _refuse_choice(choice: Choice, *, of: Path) -> None:
    """A file or job has an order; options that would choose another one are no part of it."""
    asked = [
        name
        for name, value, default in (
            ("--placement", choice.placement, AUTO),
            ("--schedule", choice.schedule, AUTO),
            ("--stages-per-rank", choice.stages_per_rank, None),
        )
        if value != default
    ]
    if asked:
        raise InputError(
            f"{of} has an order of its own: {', '.join(asked)} would choose another one",
            remedy=f"leave out {of}, or {', '.join(asked)}",
        )


def _refuse_sizes(options: PipelineOptions, *, of: Path, ranks: int, microbatches: int) -> None:
    for option, asked, has in (
        ("--ranks", options.ranks, ranks),
        ("--microbatches", options.microbatches, microbatches),
    ):
        if asked not in (None, has):
            raise InputError(
                f"{option} {asked} was given, {of} has {has}", remedy=f"leave out {option}"
            )


def _of_options(options: PipelineOptions, choice: Choice, progress: Progress) -> Shown:
    per_rank = choice.stages_per_rank
    pipeline = options.pipeline(stages_per_rank=per_rank or MOST_STAGES_PER_RANK)
    one_f_one_b = yardstick(pipeline)
    candidate = _named(pipeline, choice)
    if candidate is not None:
        progress(f"{candidate.schedule} on placement {candidate.shape}")
        found = evaluate(pipeline, candidate=candidate, effort=choice.effort, seed=choice.seed)
        if isinstance(found, Misfit):
            raise ScheduleError(
                f"schedule {candidate.schedule} on placement {candidate.shape}: {found.reason}",
                remedy="deepopt schedule compare, with the same options, lists what fits",
            )
        return Shown(
            outcome=found,
            yardstick=one_f_one_b,
            has_unit=True,
            origin=_origin(found, candidate),
        )
    tried = searches(SHAPES if pipeline.num_ranks > 1 else SHAPES[:1])
    comparison = compare(
        pipeline, tried=tried, effort=choice.effort, seed=choice.seed, progress=progress
    )
    chosen, best = comparison.found[0]
    return Shown(
        outcome=best,
        yardstick=one_f_one_b,
        has_unit=True,
        origin=f"{_origin(best, chosen)}, the fastest of {len(tried)} placements",
    )


def _named(pipeline: Pipeline, choice: Choice) -> Candidate | None:
    """The candidate that a choice names; None where the placement is free."""
    known = [AUTO, *(kind.value for kind in PlacementKind)]
    if choice.placement not in known:
        raise InputError(f"--placement {choice.placement!r} is not one of {', '.join(known)}")
    if choice.schedule not in (AUTO, *BUILDERS):
        raise InputError(
            f"--schedule {choice.schedule!r} is not a schedule",
            remedy=f"known: {AUTO}, {', '.join(BUILDERS)}",
        )
    name = SEARCHED if choice.schedule == AUTO else choice.schedule
    if choice.placement != AUTO:
        kind = PlacementKind(choice.placement)
    elif choice.schedule != AUTO:
        kind = BUILDERS[choice.schedule].placements[0]
    elif choice.stages_per_rank is not None:
        kind = PlacementKind.LINE
    else:
        return None
    per_rank = choice.stages_per_rank
    if per_rank is None:
        per_rank = 2 if choice.schedule == "interleaved_1f1b" else 1
    elif kind is not PlacementKind.LINE:
        raise InputError(
            f"--stages-per-rank {per_rank} is of placement line; {kind} has its own number",
            remedy="leave it out, or choose --placement line",
        )
    if kind is PlacementKind.V:
        per_rank = 2
    return Candidate(shape=Shape(kind=kind, stages_per_rank=per_rank), schedule=name)


def _origin(outcome: Outcome, candidate: Candidate) -> str:
    name = outcome.schedule.name
    if candidate.schedule != SEARCHED:
        return f"{name}: {BUILDERS[name].summary}"
    if name == SEARCHED:
        return f"searched; of the builders {outcome.best_builder or 'none fits'} is nearest"
    return f"{name}: no search found a faster one"


def _of_csv(path: Path, options: PipelineOptions) -> Shown:
    read = read_order(path)
    order = read.schedule
    fault = find_order_fault(read, memory_cap=options.memory_cap, buffers=1)
    if fault is not None:
        raise ScheduleError(
            f"{path}: {fault.message}",
            remedy=f"deepopt schedule verify {path} draws the fault",
        )
    placement = order.placement
    _refuse_sizes(
        options, of=path, ranks=placement.num_ranks, microbatches=order.num_microbatches
    )
    per_rank = placement.num_stages // placement.num_ranks
    pipeline = options.pipeline_of(
        num_ranks=placement.num_ranks,
        num_microbatches=order.num_microbatches,
        stages_per_rank=per_rank,
    )
    return Shown(
        outcome=judge(order, costs=_table(pipeline, order)),
        yardstick=yardstick(pipeline),
        has_unit=True,
        origin=str(path),
    )


def _table(pipeline: Pipeline, order: Schedule) -> CostTable:
    """The costs of the stages of an order, cut for its placement."""
    placement = order.placement
    lanes = placement.num_stages // placement.num_ranks
    shape = Shape(kind=placement.kind, stages_per_rank=lanes)
    return pipeline.table(pipeline.cuts(shape)[0], placement=placement)


def _of_plan(source: Path, options: PipelineOptions) -> Shown:
    planned = plan_of(source)
    plan, order, has_unit = planned.plan, planned.order, planned.has_unit
    placement = order.placement
    sizes = {"num_ranks": placement.num_ranks, "num_microbatches": order.num_microbatches}
    _refuse_sizes(
        options, of=source, ranks=placement.num_ranks, microbatches=order.num_microbatches
    )
    if options.costs is not None:
        pipeline = options.pipeline_of(
            **sizes, stages_per_rank=placement.num_stages // placement.num_ranks
        )
        costs, has_unit = _table(pipeline, order), True
    else:
        options.refuse_without_costs(of=str(source))
        pipeline = Pipeline(
            num_ranks=placement.num_ranks,
            replicas=two_groups(order.num_microbatches, num_replicas=plan.data_size),
            layers=planned.layers,
        )
        costs = planned.layers.table(
            plan.boundaries, placement=placement, num_replicas=plan.data_size
        )
    if options.memory_cap is not None:
        verify(order, memory_cap=stage_cap(options.memory_cap, placement=placement))
    words = "" if options.costs is not None else f", {planned.cost_words}"
    return Shown(
        outcome=judge(order, costs=costs),
        yardstick=yardstick(pipeline),
        has_unit=has_unit,
        origin=f"{order.name}, plan {plan.plan_id} of {source}{words}",
    )
