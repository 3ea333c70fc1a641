"""One order on one placement, and what it takes: whoever made it, it is judged alike. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from deepopt.planner.cut import Cut
from deepopt.planner.shapes import Shape
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.ir import Schedule
from deepopt.schedule.lowering import count_transfers
from deepopt.schedule.memory import Memory
from deepopt.schedule.search import NAME
from deepopt.schedule.simulate import CostTable, Timeline, simulate
from deepopt.schedule.verify import peak_activations, verify

SEARCHED = NAME
"""Stands for a search where a candidate names no builder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An order to try.

    Args:
        shape: placement.
        schedule: a builder, or `searched`.
    """

    shape: Shape
    schedule: str = SEARCHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One order on one placement.

    Args:
        cut: of the layers; None where stages are all that is known.
        schedules: the order of each replica.
        timeline: the order of the slowest replica in time; it sets the figures.
        step_s: simulated step time; among others where steps overlap.
        lower_bound_s: no order of this placement and memory is faster; None where ranks wait for
            cores, which the bound does not know.
        peak_activations: per rank, the most micro-batches in flight, in shares of a rank.
        num_transfers: tensors sent between ranks in a step.
        best_builder: for a searched order, the fastest builder that fits; None otherwise.
        keys: of the searched orders, by replica (see `planner.orders`); empty for a builder's.
    """

    cut: Cut | None
    schedules: tuple[Schedule, ...]
    timeline: Timeline
    step_s: float
    lower_bound_s: float | None
    peak_activations: tuple[float, ...]
    num_transfers: int
    best_builder: str | None = None
    keys: tuple[str, ...] = ()

    @property
    def schedule(self) -> Schedule:
        """The order of the slowest replica."""
        return self.timeline.schedule

    @property
    def shape(self) -> Shape:
        """The placement."""
        placement = self.schedule.placement
        return Shape(
            kind=placement.kind, stages_per_rank=placement.num_stages // placement.num_ranks
        )

    @property
    def weight_copies(self) -> int:
        """Ranks that hold each stage's weights; with an odd mirror, all but the middle one's."""
        placement = self.schedule.placement
        return max(len(placement.copies_of(stage)) for stage in range(placement.num_stages))

    @property
    def gap(self) -> float | None:
        """How much slower than the bound, as a share of it."""
        if self.lower_bound_s is None:
            return None
        return self.step_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0

    @property
    def preference(self) -> tuple[float, int, float, int]:
        """Orders sort by it: the faster first, then fewer copies, less memory, fewer messages."""
        return (
            float(f"{self.step_s:.9g}"),  # sums of floats differ below
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


def judge(
    schedule: Schedule,
    *,
    costs: CostTable,
    memory: Memory | None = None,
    cores: int | None = None,
    overlap: bool = False,
    is_verified: bool = False,
) -> Outcome:
    """What an order takes, whoever made it.

    Args:
        schedule: the order.
        costs: of its stages.
        memory: that it has to fit; None for any.
        cores: host cores that the ranks share; None for a device each.
        overlap: whether steps overlap.
        is_verified: a search or a file gave it, which verify what they give: at 64 ranks that is most of
            the time that a search takes.

    Raises:
        ScheduleError: the order is wrong, or the costs are made for other sizes.
    """
    placement = schedule.placement
    if not is_verified:
        verify(schedule)
    timeline = simulate(schedule, costs, cores=cores)
    bound_s = None
    if cores is None or cores >= placement.num_ranks:  # then nobody waits for a core
        bound_s = (
            max(timeline.busy_s)
            if overlap
            else lower_bound_s(
                placement, directions=schedule.directions, costs=costs, memory=memory
            )
        )
    share = placement.num_ranks / placement.num_stages
    return Outcome(
        cut=None,
        schedules=(schedule,),
        timeline=timeline,
        step_s=timeline.steady_s if overlap else timeline.makespan_s,
        lower_bound_s=bound_s,
        peak_activations=tuple(peak * share for peak in peak_activations(schedule)),
        num_transfers=count_transfers(schedule),
    )
