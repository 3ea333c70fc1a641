"""When a worker group shrinks, when it grows again, and by which plan. Pure.

A group shrinks when no device can be had for a replacement, and never for another reason; it grows
when a place that it lost has a process again. Either way the numbers stay the same bits, because
gradient groups do not change with the number of workers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from deepopt.config import FaultsConfig, JobConfig
from deepopt.errors import PlanError
from deepopt.head.generation import Generation
from deepopt.planner.decide import FILE, Planned, make_plan
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import Known
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton

SEARCH_EFFORT = 20_000  # a tenth of a launch's: workers wait for it
_AUTO = "auto"
BAD_PLACE_AFTER = 2  # lost devices at one place: a first one may be mended by a new process


def without_place(generation: Generation, *, now_s: float, faults: FaultsConfig) -> list[int]:
    """Ranks of a group that forms after a fault for which no device can be had; none while that is
    not certain, or where the others are too few.

    Args:
        generation: the group.
        now_s: the time.
        faults: how long to wait for a device, and with how many workers to go on at least.
    """
    if faults.shrink == "never" or now_s - generation.began_s <= faults.place_timeout_s:
        return []
    missing = [m.sender.rank for m in generation.members if not m.pid and m.failure is None]
    left = len(generation.members) - len(missing)
    return missing if left >= faults.min_workers else []


def bad_places(
    lost_s: Mapping[int, Sequence[float]], *, now_s: float, window_s: float
) -> frozenset[int]:
    """Places whose device was lost again: a new process there would lose it once more.

    Args:
        lost_s: when each place lost its device.
        now_s: the time.
        window_s: how long a loss counts.
    """
    return frozenset(
        place
        for place, times_s in lost_s.items()
        if sum(now_s - at_s < window_s for at_s in times_s) >= BAD_PLACE_AFTER
    )


def grows_now(
    found_s: Mapping[int, float],
    *,
    missing: Collection[int],
    resized_s: Sequence[float],
    now_s: float,
    faults: FaultsConfig,
) -> bool:
    """Whether a group should take in the places that were found.

    It waits for `grow_after_s` since the last change of size, twice as long with each shrink within
    `window_s` before: a device that comes and goes costs ever less. While some places are still
    missing it also waits that long for them since the last one came.

    Args:
        found_s: since when each place has a process again.
        missing: places without a worker.
        resized_s: when the group shrank, the last time last.
        now_s: the time.
        faults: `grow_after_s` and `window_s`.
    """
    if not found_s or faults.grow_after_s is None:
        return False
    lately = [at_s for at_s in resized_s if now_s - at_s < faults.window_s]
    wait_s = faults.grow_after_s * 2.0 ** max(0, len(lately) - 1)
    if resized_s and now_s - resized_s[-1] < wait_s:
        return False
    all_there = set(missing) <= found_s.keys()
    return all_there or now_s - max(found_s.values()) >= faults.grow_after_s


def layouts(available: int, *, data: int) -> list[tuple[int, int]]:
    """(workers, replicas) that so many places can hold: most workers first, then most replicas.

    Args:
        available: places.
        data: replicas wanted.
    """
    found = [(available // d * d, d) for d in range(data, 0, -1) if available // d]
    return sorted(found, key=lambda layout: (-layout[0], -layout[1]))


def plan_for(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    wanted: Plan,
    available: int,
    plan_id: int,
    costs: LayerCosts | None,
    cores: int | None,
    known: Known | None,
) -> Planned:
    """The best plan for another number of workers, with the job's gradient groups.

    What the job says of placement and schedule holds where it fits; boundaries and orders are for
    the number of workers that they were made for.

    Args:
        job: the resolved job.
        skeleton: its model.
        wanted: the plan with all workers.
        available: places that there are.
        plan_id: number of the plan in the job.
        costs: of the layers; None to estimate them.
        cores: host cores that the workers share; None where each has its own.
        known: orders that were searched before.

    Raises:
        PlanError: no plan fits.
    """
    trouble = PlanError(f"no workers for a plan of {wanted.world_size}")
    training = job.training.model_copy(update={"groups": wanted.num_groups})
    schedule = _AUTO if job.pipeline.schedule.startswith(FILE) else job.pipeline.schedule
    as_asked = {"boundaries": None, "schedule": schedule}
    free = {**as_asked, "schedule": _AUTO, "placement": _AUTO}
    for num_workers, data in layouts(available, data=wanted.data_size):
        ranks = num_workers // data
        fitting = costs
        if costs is not None and not costs.names_ranks(ranks):
            fitting = costs.on_any_ranks(ranks)
        for pipeline in (as_asked, free):
            asked = job.model_copy(
                update={
                    "training": training,
                    "pipeline": job.pipeline.model_copy(update=pipeline),
                    "parallel": job.parallel.model_copy(
                        update={"pipeline": None, "data": data}
                    ),
                }
            )
            try:
                return make_plan(
                    asked,
                    skeleton,
                    num_workers=num_workers,
                    plan_id=plan_id,
                    costs=fitting,
                    cores=cores,
                    effort=SEARCH_EFFORT,
                    known=known,
                )
            except PlanError as problem:
                trouble = problem
    raise trouble


def places_for(plan: Plan, *, of_wanted: int, there: Sequence[int]) -> tuple[int, ...]:
    """The place of each rank: its own where all are there, else those that are there in order.

    Args:
        plan: the new one.
        of_wanted: places of the full group.
        there: places that can hold a worker.
    """
    if plan.world_size == of_wanted:
        return tuple(range(of_wanted))
    return tuple(sorted(there)[: plan.world_size])
