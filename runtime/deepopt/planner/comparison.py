"""Every placement and order for one pipeline, side by side: what each takes, holds and sends.

Pure, for people who want to see a choice before they make it; nothing is chosen for a job here.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepopt.errors import PlanError, ScheduleError
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import Placement, PlacementKind, Schedule, place
from deepopt.schedule.search import NAME, search
from deepopt.schedule.simulate import CostTable, Timeline, simulate
from deepopt.schedule.verify import verify

YARDSTICK = "1f1b"
SEARCHED = NAME
"""Stands for a search where a candidate names no builder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One order on one placement.

    Args:
        timeline: the order in time.
        lower_bound_s: no order of this placement is faster.
        peak_activations: per rank, the most micro-batches in flight, in shares of a rank.
        num_transfers: tensors sent between ranks in a step.
        best_builder: for a searched order, the builder that came nearest; None otherwise.
    """

    timeline: Timeline
    lower_bound_s: float
    peak_activations: tuple[float, ...]
    num_transfers: int
    best_builder: str | None = None

    @property
    def schedule(self) -> Schedule:
        """The order."""
        return self.timeline.schedule

    @property
    def stages_per_rank(self) -> int:
        """Stages that each rank holds; with mirror placement, of one direction."""
        return self.schedule.placement.num_stages // self.schedule.placement.num_ranks

    @property
    def weight_copies(self) -> int:
        """Ranks that hold each stage's weights; with an odd mirror, all but the middle one's."""
        placement = self.schedule.placement
        return max(len(placement.copies_of(stage)) for stage in range(placement.num_stages))

    @property
    def gap(self) -> float:
        """How much slower than the bound, as a share of it."""
        if self.lower_bound_s <= 0:
            return 0.0
        return self.timeline.makespan_s / self.lower_bound_s - 1

    @property
    def preference(self) -> tuple[float, int, float, int]:
        """Orders sort by it: the faster first, then fewer copies, less memory, fewer messages."""
        return (
            round(self.timeline.makespan_s, 9),  # nanoseconds: sums of floats differ below
            self.weight_copies,
            max(self.peak_activations),
            self.num_transfers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """An order that cannot be had.

    Args:
        reason: in one sentence.
    """

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An order to try.

    Args:
        kind: placement.
        stages_per_rank: with placement line; else what the placement has.
        schedule: a builder, or `searched`.
    """

    kind: PlacementKind
    stages_per_rank: int
    schedule: str

    @property
    def placement_words(self) -> str:
        """For people: `line`, `line x 2`, `v`, `mirror`."""
        several = self.kind is PlacementKind.LINE and self.stages_per_rank > 1
        return f"{self.kind} x {self.stages_per_rank}" if several else str(self.kind)


def candidates(
    num_ranks: int, *, most_stages_per_rank: int, with_search: bool
) -> tuple[Candidate, ...]:
    """Every builder on every placement that it is made for, and a search on each placement.

    Args:
        num_ranks: with one rank there is one direction, and a mirror is a line.
        most_stages_per_rank: of placement line.
        with_search: also searched orders.
    """
    placements = [(PlacementKind.LINE, n) for n in range(1, most_stages_per_rank + 1)]
    placements.append((PlacementKind.V, 2))
    if num_ranks > 1:
        placements.append((PlacementKind.MIRROR, 1))
    found = []
    for kind, per_rank in placements:
        placement = place(kind, num_ranks=num_ranks, stages_per_rank=per_rank)
        names = [name for name in BUILDERS if misfit(name, placement=placement) is None]
        if kind is PlacementKind.LINE and per_rank == 1:
            names.remove("interleaved_1f1b")  # the same order as 1f1b
        found += [
            Candidate(kind=kind, stages_per_rank=per_rank, schedule=name)
            for name in (*names, *((SEARCHED,) if with_search else ()))
        ]
    return tuple(found)


def evaluate(
    pipeline: Pipeline, *, candidate: Candidate, effort: int, seed: int
) -> Outcome | Misfit:
    """Build or search one order and see what it takes.

    Args:
        pipeline: sizes and costs.
        candidate: what to try.
        effort: of a search, as for `schedule.search`.
        seed: of a search.
    """
    try:
        placement = pipeline.place(candidate.kind, stages_per_rank=candidate.stages_per_rank)
        if candidate.schedule == SEARCHED:
            return search_order(pipeline, placement=placement, effort=effort, seed=seed)
        schedule = build(
            candidate.schedule,
            placement=placement,
            directions=pipeline.directions(placement),
        )
        outcome = judge(schedule, costs=pipeline.table(placement))
    except (PlanError, ScheduleError) as error:
        return Misfit(reason=error.message)
    held = max(outcome.peak_activations)
    if pipeline.memory_cap is not None and held > pipeline.memory_cap + 1e-9:
        return Misfit(
            reason=f"holds activations of {held:g} micro-batches on a rank, the cap is "
            f"{pipeline.memory_cap:g}"
        )
    return outcome


def search_order(
    pipeline: Pipeline, *, placement: Placement, effort: int, seed: int
) -> Outcome:
    """Search an order on a placement.

    Args:
        pipeline: sizes and costs.
        placement: stages on ranks.
        effort: as for `schedule.search`.
        seed: of the random choices.

    Raises:
        ScheduleError: nothing fits the memory.
    """
    costs = pipeline.table(placement)
    result = search(
        placement,
        directions=pipeline.directions(placement),
        costs=costs,
        memory_cap=pipeline.stage_cap(placement),
        effort=effort,
        seed=seed,
    )
    return judge(result.schedule, costs=costs, best_builder=result.builder)


def judge(schedule: Schedule, *, costs: CostTable, best_builder: str | None = None) -> Outcome:
    """What an order takes, whoever made it.

    Args:
        schedule: the order.
        costs: of its stages.
        best_builder: as for `Outcome`.

    Raises:
        ScheduleError: the order is wrong, or the costs are made for other sizes.
    """
    placement = schedule.placement
    report = verify(schedule)
    share = placement.num_ranks / placement.num_stages
    return Outcome(
        timeline=simulate(schedule, costs),
        lower_bound_s=lower_bound_s(placement, directions=schedule.directions, costs=costs),
        peak_activations=tuple(peak * share for peak in report.peak_activations),
        num_transfers=report.num_transfers,
        best_builder=best_builder,
    )
