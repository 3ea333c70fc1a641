"""The pipeline that orders are for: sizes and costs by options, a job file or a run directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deepopt.planner.comparison import (
    YARDSTICK,
    Candidate,
    Misfit,
    Outcome,
    candidates,
    evaluate,
)
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.ir import PlacementKind
from deepopt_cli.schedule_options import PipelineOptions

if TYPE_CHECKING:
    from deepopt.planner.plan import Plan
    from deepopt.schedule.ir import Schedule

Progress = Callable[[str], None]
ESTIMATED = "estimated"  # source of costs by operation counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A pipeline to compare orders for.

    Args:
        pipeline: sizes and costs.
        has_unit: the costs are seconds.
        words: what it is, for people.
    """

    pipeline: Pipeline
    has_unit: bool
    words: str


def subject(source: Path | None, *, options: PipelineOptions, stages_per_rank: int) -> Subject:
    """The pipeline that orders are compared for.

    Args:
        source: a job file or run directory; None for the options alone.
        options: sizes and costs.
        stages_per_rank: the most of placement line.

    Raises:
        DeepoptError: what is wrong, with the values.
    """
    if source is None:
        pipeline = options.pipeline(stages_per_rank=stages_per_rank)
        return Subject(pipeline=pipeline, has_unit=True, words="given costs")
    planned = plan_of(source)
    plan = planned.plan
    num_ranks = options.ranks or plan.pipeline_size
    num_microbatches = options.microbatches or len(plan.directions(0))
    if options.costs is not None:
        pipeline = options.pipeline_of(
            num_ranks=num_ranks,
            num_microbatches=num_microbatches,
            stages_per_rank=stages_per_rank,
        )
        return Subject(
            pipeline=pipeline, has_unit=True, words=f"sizes of {source}, given costs"
        )
    options.refuse_without_costs(of=str(source))
    pipeline = Pipeline(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        layers=planned.layers,
        memory_cap=options.memory_cap,
        num_replicas=plan.data_size,
    )
    return Subject(
        pipeline=pipeline,
        has_unit=planned.has_unit,
        words=f"{source}, {planned.cost_words}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Orders side by side.

    Args:
        found: what can be had, the preferred first.
        misfits: what cannot.
        yardstick_s: makespan of 1F1B, whatever the memory; None where it does not run.
        has_unit: the costs are seconds.
    """

    found: tuple[tuple[Candidate, Outcome], ...]
    misfits: tuple[tuple[Candidate, Misfit], ...]
    yardstick_s: float | None
    has_unit: bool


def compared(
    about: Subject,
    *,
    stages_per_rank: int,
    with_search: bool,
    effort: int,
    seed: int,
    progress: Progress,
) -> Comparison:
    """Try everything.

    Args:
        about: the pipeline.
        stages_per_rank: the most of placement line.
        with_search: also searched orders.
        effort: of each search.
        seed: of each search.
        progress: told what is being tried.
    """
    pipeline = about.pipeline
    tried = candidates(
        pipeline.num_ranks, most_stages_per_rank=stages_per_rank, with_search=with_search
    )
    found: list[tuple[Candidate, Outcome]] = []
    misfits: list[tuple[Candidate, Misfit]] = []
    for index, candidate in enumerate(tried, start=1):
        progress(f"{index} of {len(tried)}: {candidate.schedule}, {candidate.placement_words}")
        result = evaluate(pipeline, candidate=candidate, effort=effort, seed=seed)
        if isinstance(result, Misfit):
            misfits.append((candidate, result))
        else:
            found.append((candidate, result))
    one_f_one_b = yardstick(pipeline)
    return Comparison(
        found=tuple(sorted(found, key=lambda entry: entry[1].preference)),
        misfits=tuple(misfits),
        yardstick_s=None if one_f_one_b is None else one_f_one_b.timeline.makespan_s,
        has_unit=about.has_unit,
    )


def yardstick(pipeline: Pipeline) -> Outcome | None:
    """1F1B on the same layers, whatever the memory holds; None where it does not run.

    Args:
        pipeline: sizes and costs.
    """
    unlimited = replace(pipeline, memory_cap=None)
    candidate = Candidate(kind=PlacementKind.LINE, stages_per_rank=1, schedule=YARDSTICK)
    found = evaluate(unlimited, candidate=candidate, effort=1, seed=0)
    return None if isinstance(found, Misfit) else found


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedOrder:
    """What a job or a run has decided.

    Args:
        plan: who does what.
        order: of the first replica.
        layers: the costs that it was planned with.
    """

    plan: Plan
    order: Schedule
    layers: LayerCosts

    @property
    def has_unit(self) -> bool:
        """Whether the costs are seconds; those that are estimated are right only as ratios."""
        return self.layers.source != ESTIMATED

    @property
    def cost_words(self) -> str:
        """Where the costs are from."""
        return f"{self.layers.source} costs"


def plan_of(source: Path) -> PlannedOrder:
    """The plan of a run directory, or the one that a job file would get.

    Args:
        source: either of them.

    Raises:
        DeepoptError: neither, or the job cannot be planned.
    """
    if source.is_dir():
        from deepopt.launch.run_view import open_run
        from deepopt.planner.orders import load_schedule
        from deepopt.planner.plan import Plan
        from deepopt.telemetry.files import read_json

        run = open_run(source)
        plan = Plan.from_json(read_json(run.plan))
        return PlannedOrder(
            plan=plan,
            order=load_schedule(plan, data_index=0, folder=run.schedules),
            layers=LayerCosts.from_json(read_json(run.costs)),
        )
    from deepopt.job_file import load_job
    from deepopt.launch.preparation import import_from, prepare, with_absolute_paths

    job = with_absolute_paths(load_job(source, ()))
    import_from([Path.cwd()], job=job)
    planned = prepare(job, plan_id=1).planned
    return PlannedOrder(plan=planned.plan, order=planned.schedules[0], layers=planned.costs)
