"""The pipeline that orders are for: sizes and costs by options, a job file or a run directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepopt.planner.choose import Comparison, candidates, compare
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.sketch import Pipeline, two_groups
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
        return Subject(
            pipeline=pipeline, has_unit=True, words=f"{pipeline.layers.source} costs"
        )
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
        replicas=two_groups(num_microbatches, num_replicas=plan.data_size),
        layers=planned.layers,
        memory_cap=options.memory_cap,
    )
    return Subject(
        pipeline=pipeline,
        has_unit=planned.has_unit,
        words=f"{source}, {planned.cost_words}",
    )


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

    Raises:
        PlanError: nothing fits.
    """
    tried = candidates(
        about.pipeline.num_ranks,
        most_stages_per_rank=stages_per_rank,
        with_search=with_search,
    )
    return compare(about.pipeline, tried=tried, effort=effort, seed=seed, progress=progress)


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
