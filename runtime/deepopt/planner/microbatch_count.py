"""Into how many micro-batches a step is cut, where the job says only how many sequences it has. Pure.

More micro-batches fill the pipeline better and hold less memory; fewer use the devices better. Costs
of each size are measured, not scaled, so both show. The count decides the rounding of gradients, so
it is chosen once, before the first launch, and is part of the job from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.decide import make_plan
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.prediction import predict
from deepopt.planner.skeleton import ModelSkeleton

MOST_PER_RANK = 8
"""Micro-batches for each rank of a pipeline beyond which hardly any bubble is left to fill."""
MOST_TRIED = 5
EFFORT = 20_000  # actions: the order itself is searched for the count that is chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedCount:
    """A number of micro-batches.

    Args:
        microbatches: of a step, over all replicas.
        microbatch_size: sequences of one.
        step_s: predicted; None where it does not fit.
        reason: why it does not.
    """

    microbatches: int
    microbatch_size: int
    step_s: float | None
    reason: str = ""


def counts_to_try(
    batch_size: int, *, ranks: int, replicas: int, groups: int | None
) -> tuple[int, ...]:
    """Numbers of micro-batches that cut a batch evenly, at most `MOST_TRIED`, ascending.

    Args:
        batch_size: sequences of a step.
        ranks: of one pipeline.
        replicas: of the pipeline; each takes as many micro-batches.
        groups: gradient groups of a step, as the job says; None for min(2, micro-batches).
    """
    least = max(replicas, groups or 1)
    most = MOST_PER_RANK * ranks * replicas
    found = [
        count
        for count in range(least, min(batch_size, most) + 1)
        if batch_size % count == 0 and count % replicas == 0
    ]
    # Small ones leave most of a pipeline idle: they are the first to go.
    return tuple(found[-MOST_TRIED:])


def with_count(job: JobConfig, count: int) -> JobConfig:
    """The job with its batch cut into so many micro-batches.

    Args:
        job: with `training.batch_size`.
        count: divides it.
    """
    assert job.training.batch_size is not None, "a job that leaves nothing open"
    sizes = {
        "microbatches": count,
        "microbatch_size": job.training.batch_size // count,
        "batch_size": None,
    }
    return job.model_copy(update={"training": job.training.model_copy(update=sizes)})


def choose_count(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    num_workers: int,
    cores: int | None,
    costs_of: Callable[[JobConfig], LayerCosts | None],
) -> tuple[JobConfig, tuple[TriedCount, ...]]:
    """Cut the batch of a job so that its step is predicted to be the shortest.

    Args:
        job: with `training.batch_size`.
        skeleton: its model.
        num_workers: of the job.
        cores: that all workers share; None where each has a device of its own.
        costs_of: measures the layers at the micro-batch size of a job; None where it cannot.

    Raises:
        PlanError: no number divides the batch, none can be measured, or none fits.
    """
    batch_size, data = job.training.batch_size, job.parallel.data
    assert batch_size is not None, "a job that leaves nothing open"
    ranks = max(1, num_workers // data)
    counts = counts_to_try(batch_size, ranks=ranks, replicas=data, groups=job.training.groups)
    if not counts:
        raise PlanError(
            f"training.batch_size {batch_size} cannot be cut into micro-batches for {data} replica(s)"
            f" and {job.training.groups or 'any number of'} gradient groups",
            remedy=f"take a multiple of {max(data, job.training.groups or 1)}",
        )
    tried = tuple(
        _tried(with_count(job, count), skeleton, num_workers, cores, costs_of)
        for count in counts
    )
    fitting = [(one.step_s, one.microbatches) for one in tried if one.step_s is not None]
    if not fitting:
        raise PlanError(
            f"training.batch_size {batch_size} fits in no number of micro-batches: "
            + "; ".join(f"{one.microbatches}: {one.reason}" for one in tried),
            remedy="take smaller or more batches, more workers, or pipeline.recompute auto",
        )
    return with_count(job, min(fitting)[1]), tried


def _tried(
    job: JobConfig,
    skeleton: ModelSkeleton,
    num_workers: int,
    cores: int | None,
    costs_of: Callable[[JobConfig], LayerCosts | None],
) -> TriedCount:
    training = job.training
    try:
        costs = costs_of(job)
        if costs is None:
            raise PlanError(
                f"its layers cannot be measured here at {training.microbatch_size} sequences"
            )
        planned = make_plan(
            job,
            skeleton,
            num_workers=num_workers,
            plan_id=1,
            costs=costs,
            cores=cores,
            effort=EFFORT,
        )
        found = predict(
            costs,
            plan=planned.plan,
            schedules=planned.schedules,
            cores=cores,
            overlap=job.pipeline.overlap_steps,
        )
        assert found is not None, "measured costs are seconds"
    except PlanError as error:
        return TriedCount(
            microbatches=training.microbatches,
            microbatch_size=training.microbatch_size,
            step_s=None,
            reason=error.message,
        )
    return TriedCount(
        microbatches=training.microbatches,
        microbatch_size=training.microbatch_size,
        step_s=found.step_s,
    )


def words(tried: Sequence[TriedCount]) -> str:
    """What was tried, in a line.

    Args:
        tried: at least one.
    """
    return ", ".join(
        f"{one.microbatches} x {one.microbatch_size} "
        + (f"{one.step_s * 1e3:.1f} ms" if one.step_s is not None else "does not fit")
        for one in tried
    )
