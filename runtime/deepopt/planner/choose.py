"""Orders for one pipeline side by side: built or searched, judged alike, the best one first.

Pure and deterministic. Costs come from outside (`Pipeline`), effort is counted in actions. What does
not fit groups, layers or memory is left out with its reason. It decides by simulated time:
a second copy of the weights pays its exchange and its update there, and its memory is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from deepopt.errors import PlanError, ScheduleError
from deepopt.planner.orders import KeptOrder, Known, input_key
from deepopt.planner.shapes import SHAPES, Shape, shapes
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import Direction, PlacementKind, Schedule
from deepopt.schedule.memory import Memory
from deepopt.schedule.search import NAME, fits, search
from deepopt.schedule.simulate import CostTable, Timeline, simulate
from deepopt.schedule.verify import verify

YARDSTICK = "1f1b"
SEARCHED = NAME
"""Stands for a search where a candidate names no builder."""

LAUNCH_EFFORT = 200_000
"""Actions a placement: about two seconds for all of p=4, m=8 on one core."""

_SEARCH_VERSION = 2  # +1 when the same inputs may give another order


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
        boundaries: index of the first layer of each stage; empty where stages are all that is known.
        schedules: the order of each replica.
        timeline: the order of the slowest replica in time; it sets the figures.
        step_s: simulated step time; among others where steps overlap.
        lower_bound_s: no order of this placement and memory is faster; None where ranks share
            cores, which the bound does not know.
        peak_activations: per rank, the most micro-batches in flight, in shares of a rank.
        num_transfers: tensors sent between ranks in a step.
        best_builder: for a searched order, the fastest builder that fits; None otherwise.
        keys: of the searched orders, by replica (see `planner.orders`); empty for a builder's.
    """

    boundaries: tuple[int, ...]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was compared, the best first.

    Args:
        found: what can be had, the preferred first; at least one.
        left_out: what cannot, with the reason.
        one_f_one_b_s: simulated step time of plain 1F1B at the same costs, whatever the memory; None
            where the model has fewer layers than ranks.
        source: where the costs are from.
    """

    found: tuple[tuple[Candidate, Outcome], ...]
    left_out: tuple[tuple[Candidate, str], ...]
    one_f_one_b_s: float | None
    source: str

    @property
    def best(self) -> Outcome:
        """The chosen one."""
        return self.found[0][1]

    @property
    def orders(self) -> dict[str, KeptOrder]:
        """All searched orders by their keys: what a later comparison need not search again."""
        return {
            key: KeptOrder(
                schedule=schedule,
                boundaries=outcome.boundaries,
                builder=outcome.best_builder,
            )
            for _, outcome in self.found
            for key, schedule in zip(outcome.keys, outcome.schedules, strict=False)
        }


def searches(of: Sequence[Shape] = SHAPES) -> tuple[Candidate, ...]:
    """A search on each placement.

    Args:
        of: the placements.
    """
    return tuple(Candidate(shape=shape) for shape in of)


def candidates(
    num_ranks: int, *, most_stages_per_rank: int, with_search: bool
) -> tuple[Candidate, ...]:
    """Every builder on every placement that it is made for, and a search on each placement.

    Args:
        num_ranks: with one rank there is one direction, and a mirror is a line.
        most_stages_per_rank: of placement line.
        with_search: also searched orders.
    """
    found = []
    for shape in shapes(most_stages_per_rank):
        if shape.kind is PlacementKind.MIRROR and num_ranks == 1:
            continue
        placement = shape.place(num_ranks)
        names = [name for name in BUILDERS if misfit(name, placement=placement) is None]
        if shape == SHAPES[0]:
            names.remove("interleaved_1f1b")  # the same order as 1f1b
        found += [
            Candidate(shape=shape, schedule=name)
            for name in (*names, *((SEARCHED,) if with_search else ()))
        ]
    return tuple(found)


def compare(
    pipeline: Pipeline,
    *,
    tried: Sequence[Candidate],
    effort: int = LAUNCH_EFFORT,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    known: Known | None = None,
) -> Comparison:
    """Try every candidate and put the fastest first.

    Args:
        pipeline: sizes and costs.
        tried: what to try.
        effort: actions to schedule or evaluate for each search.
        seed: of the random choices.
        progress: told what is being tried.
        known: orders that were searched before, by their keys.

    Raises:
        PlanError: nothing fits; names the reason of each candidate.
    """
    found: list[tuple[Candidate, Outcome]] = []
    left_out: list[tuple[Candidate, str]] = []
    for index, candidate in enumerate(tried, start=1):
        if progress is not None:
            progress(f"{index} of {len(tried)}: {candidate.schedule}, {candidate.shape}")
        result = evaluate(pipeline, candidate=candidate, effort=effort, seed=seed, known=known)
        if isinstance(result, Misfit):
            left_out.append((candidate, result.reason))
        else:
            found.append((candidate, result))
    if not found:
        reasons = "; ".join(f"{candidate.shape}: {reason}" for candidate, reason in left_out)
        raise PlanError(
            f"no placement fits: {reasons}",
            remedy="use smaller micro-batches, more memory or ranks, or pipeline.recompute full, or "
            "name another pipeline.placement",
        )
    plain = yardstick(pipeline)
    return Comparison(
        found=tuple(sorted(found, key=lambda entry: entry[1].preference)),
        left_out=tuple(left_out),
        one_f_one_b_s=None if plain is None else plain.step_s,
        source=pipeline.layers.source,
    )


def evaluate(
    pipeline: Pipeline,
    *,
    candidate: Candidate,
    effort: int,
    seed: int,
    known: Known | None = None,
) -> Outcome | Misfit:
    """Build or search one order and see what it takes.

    Args:
        pipeline: sizes and costs.
        candidate: what to try.
        effort: of a search, as for `schedule.search`.
        seed: of a search.
        known: orders that were searched before, by their keys.
    """
    try:
        if candidate.schedule != SEARCHED:
            return _built(pipeline, candidate)
        return _searched(
            pipeline, candidate.shape, effort=effort, seed=seed, known=known or _none
        )
    except (PlanError, ScheduleError) as problem:
        return Misfit(reason=problem.message)


def yardstick(pipeline: Pipeline) -> Outcome | None:
    """1F1B on the same layers, whatever the memory holds; None where it does not run.

    Args:
        pipeline: sizes and costs.
    """
    free = replace(
        pipeline,
        layers=replace(pipeline.layers, memory_bytes=()),
        memory_cap=None,
        capped_as_1f1b=False,
        boundaries=None,
    )
    candidate = Candidate(shape=SHAPES[0], schedule=YARDSTICK)
    found = evaluate(free, candidate=candidate, effort=1, seed=0)
    return None if isinstance(found, Misfit) else found


def judge(
    schedule: Schedule,
    *,
    costs: CostTable,
    memory: Memory | None = None,
    cores: int | None = None,
    overlap: bool = False,
) -> Outcome:
    """What an order takes, whoever made it.

    Args:
        schedule: the order.
        costs: of its stages.
        memory: that it has to fit; None for any.
        cores: host cores that the ranks share; None for a device each.
        overlap: whether steps overlap.

    Raises:
        ScheduleError: the order is wrong, or the costs are made for other sizes.
    """
    placement = schedule.placement
    report = verify(schedule)
    timeline = simulate(schedule, costs, cores=cores)
    bound_s = None
    if cores is None:
        bound_s = (
            max(timeline.busy_s)
            if overlap
            else lower_bound_s(
                placement, directions=schedule.directions, costs=costs, memory=memory
            )
        )
    share = placement.num_ranks / placement.num_stages
    return Outcome(
        boundaries=(),
        schedules=(schedule,),
        timeline=timeline,
        step_s=timeline.steady_s if overlap else timeline.makespan_s,
        lower_bound_s=bound_s,
        peak_activations=tuple(peak * share for peak in report.peak_activations),
        num_transfers=report.num_transfers,
    )


def _none(key: str) -> None:
    """Nothing is known."""


def _built(pipeline: Pipeline, candidate: Candidate) -> Outcome:
    placement = pipeline.place(candidate.shape)
    boundaries = pipeline.cut(candidate.shape)
    ways = pipeline.directions(placement)
    orders = {
        directions: build(candidate.schedule, placement=placement, directions=directions)
        for directions in dict.fromkeys(ways)
    }
    return _judged(pipeline, boundaries, [orders[directions] for directions in ways])


def _searched(
    pipeline: Pipeline, shape: Shape, *, effort: int, seed: int, known: Known
) -> Outcome:
    placement = pipeline.place(shape)
    ways = pipeline.directions(placement)
    keys = {
        directions: _key(pipeline, shape, directions, effort=effort, seed=seed)
        for directions in dict.fromkeys(ways)
    }
    kept = {directions: known(key) for directions, key in keys.items()}
    found = [one for one in kept.values() if one is not None]
    if len(found) < len(kept) or any(one.boundaries != found[0].boundaries for one in found):
        found = _search_all(pipeline, shape, tuple(keys), effort=effort, seed=seed)
    orders = dict(zip(keys, found, strict=True))
    outcome = _judged(
        pipeline, found[0].boundaries, [orders[directions].schedule for directions in ways]
    )
    return replace(
        outcome,
        keys=tuple(keys[directions] for directions in ways),
        best_builder=orders[outcome.schedule.directions].builder,
    )


def _search_all(
    pipeline: Pipeline,
    shape: Shape,
    ways: Sequence[tuple[Direction, ...]],
    *,
    effort: int,
    seed: int,
) -> list[KeptOrder]:
    """An order for each way that micro-batches go."""
    placement = pipeline.place(shape)
    boundaries = pipeline.cut(shape)
    table = pipeline.table(boundaries, placement=placement)
    memory = pipeline.memory(boundaries, placement=placement)
    found = []
    for directions in ways:
        result = search(
            placement,
            directions=directions,
            costs=table,
            memory=memory,
            cores=pipeline.cores_of_a_replica,
            overlap=pipeline.overlap,
            effort=effort,
            seed=seed,
        )
        found.append(
            KeptOrder(schedule=result.schedule, boundaries=boundaries, builder=result.builder)
        )
    return found


def _key(
    pipeline: Pipeline,
    shape: Shape,
    directions: tuple[Direction, ...],
    *,
    effort: int,
    seed: int,
) -> str:
    """The name of what a search finds."""
    inputs = {
        **asdict(pipeline),
        "replicas": len(pipeline.replicas),
        "shape": asdict(shape),
        "directions": directions,
        "effort": effort,
        "seed": seed,
        "version": _SEARCH_VERSION,
    }
    return input_key(inputs)


def _judged(
    pipeline: Pipeline, boundaries: tuple[int, ...], schedules: Sequence[Schedule]
) -> Outcome:
    """What the orders of all replicas take; the slowest one sets the figures."""
    placement = schedules[0].placement
    table = pipeline.table(boundaries, placement=placement)
    memory = pipeline.memory(boundaries, placement=placement)
    outcomes = [
        judge(
            order,
            costs=table,
            memory=memory,
            cores=pipeline.cores_of_a_replica,
            overlap=pipeline.overlap,
        )
        for order in dict.fromkeys(schedules)
    ]
    slowest = max(outcomes, key=lambda outcome: outcome.step_s)
    _refuse_too_many(slowest, pipeline, memory)
    return replace(slowest, boundaries=boundaries, schedules=tuple(schedules))


def _refuse_too_many(outcome: Outcome, pipeline: Pipeline, memory: Memory) -> None:
    if fits(outcome.schedule, memory):
        return
    held = max(outcome.peak_activations)
    if pipeline.layers.knows_memory:
        raise ScheduleError(
            f"holds activations of {held:g} micro-batches on a rank, which its memory does not"
        )
    cap = max(memory.caps) * len(memory.caps) / len(memory.kept)
    raise ScheduleError(
        f"holds activations of {held:g} micro-batches on a rank, the cap is {cap:g}"
    )
