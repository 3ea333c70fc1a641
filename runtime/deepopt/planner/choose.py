"""Which placement, cut and order make the shortest step: all that fit are searched and compared.

Pure and deterministic. Costs come from outside (`LayerCosts`), effort is counted in actions. What does
not fit groups, layers or memory is left out with its reason. It decides by simulated time alone:
a second copy of the weights pays its exchange and its update there, and its memory is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError, ScheduleError
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.partition import partition, partition_folded
from deepopt.schedule.builders import build
from deepopt.schedule.ir import Placement, PlacementKind, Schedule, directions_of, place
from deepopt.schedule.memory import Memory, peaks
from deepopt.schedule.search import SearchResult, search
from deepopt.schedule.simulate import simulate

LAUNCH_EFFORT = 200_000
"""Actions a placement: about two seconds for all of p=4, m=8 on one core."""

MOST_STAGES_PER_RANK = 4  # more stages make smaller bubbles than their messages are worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A placement to look at.

    Args:
        kind: line, v or mirror.
        stages_per_rank: stages of which a rank runs each micro-batch: 1 to 4 with line, 2 with v.
    """

    kind: PlacementKind
    stages_per_rank: int = 1

    def __str__(self) -> str:
        many = self.kind is PlacementKind.LINE and self.stages_per_rank > 1
        return f"{self.kind} x{self.stages_per_rank}" if many else str(self.kind)

    def place(self, num_ranks: int) -> Placement:
        """Its stages on ranks.

        Args:
            num_ranks: of one pipeline.
        """
        return place(self.kind, num_ranks=num_ranks, stages_per_rank=self.stages_per_rank)


SHAPES = (
    *(
        Shape(kind=PlacementKind.LINE, stages_per_rank=count)
        for count in range(1, MOST_STAGES_PER_RANK + 1)
    ),
    Shape(kind=PlacementKind.V, stages_per_rank=2),
    Shape(kind=PlacementKind.MIRROR),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One placement with the best order found for it.

    Args:
        shape: the placement.
        boundaries: index of the first layer of each stage.
        schedules: the order of each replica; the slowest one sets the figures.
        makespan_s: simulated step time.
        bubble: idle share of it.
        gap: how much slower than the bound, as a share of it; None where ranks share cores, which
            the bound does not know.
        peak_activations: stage micro-batches in flight on the worst rank.
        weight_copies: copies of the weights.
        builder: the fastest classical order that fits; None when none does.
        builder_makespan_s: its simulated step time.
    """

    shape: Shape
    boundaries: tuple[int, ...]
    schedules: tuple[Schedule, ...]
    makespan_s: float
    bubble: float
    gap: float | None
    peak_activations: int
    weight_copies: int
    builder: str | None
    builder_makespan_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was compared, the best first.

    Args:
        candidates: in ascending order of step time; at least one.
        left_out: placements that do not fit, with the reason.
        one_f_one_b_s: simulated step time of plain 1F1B at the same costs; None where the model
            has fewer layers than ranks.
        source: where the costs are from.
    """

    candidates: tuple[Candidate, ...]
    left_out: tuple[tuple[Shape, str], ...]
    one_f_one_b_s: float | None
    source: str

    @property
    def best(self) -> Candidate:
        """The chosen one."""
        return self.candidates[0]


def compare(
    costs: LayerCosts,
    *,
    num_ranks: int,
    replicas: Sequence[Sequence[int]],
    shapes: Sequence[Shape] = SHAPES,
    boundaries: tuple[int, ...] | None = None,
    cores: int | None = None,
    overlap: bool = False,
    effort: int = LAUNCH_EFFORT,
    seed: int = 0,
) -> Comparison:
    """Search every placement that fits and put the fastest first.

    Args:
        costs: of the layers, links and ranks.
        num_ranks: of one pipeline.
        replicas: micro-batches of each gradient group, for each replica of the pipeline.
        shapes: placements to look at.
        boundaries: a cut to keep to; None to fit one to the costs.
        cores: host cores that all workers share; None where each has a device of its own.
        overlap: whether steps overlap, as for `search`.
        effort: actions to schedule or evaluate for each placement and replica.
        seed: of the random choices.

    Raises:
        PlanError: nothing fits; names the reason of each placement.
    """
    per_replica = None if cores is None else max(1, cores // len(replicas))
    candidates: list[Candidate] = []
    left_out: list[tuple[Shape, str]] = []
    for shape in shapes:
        try:
            candidates.append(
                _candidate(
                    costs,
                    shape,
                    num_ranks=num_ranks,
                    replicas=replicas,
                    boundaries=boundaries,
                    cores=per_replica,
                    overlap=overlap,
                    effort=effort,
                    seed=seed,
                )
            )
        except (PlanError, ScheduleError) as problem:
            left_out.append((shape, problem.message))
    if not candidates:
        reasons = "; ".join(f"{shape}: {reason}" for shape, reason in left_out)
        raise PlanError(
            f"no placement fits: {reasons}",
            remedy="use smaller micro-batches, more ranks or pipeline.recompute full, or name "
            "another pipeline.placement",
        )
    candidates.sort(key=lambda c: (c.makespan_s, c.weight_copies, c.peak_activations))
    return Comparison(
        candidates=tuple(candidates),
        left_out=tuple(left_out),
        one_f_one_b_s=one_f_one_b_s(
            costs, num_ranks=num_ranks, replicas=replicas, cores=per_replica, overlap=overlap
        ),
        source=costs.source,
    )


def fit_boundaries(costs: LayerCosts, shape: Shape, *, num_ranks: int) -> tuple[int, ...]:
    """The cut that leaves the busiest rank as little to do as possible, by its own speed.

    Args:
        costs: of the layers and ranks.
        shape: the placement.
        num_ranks: of one pipeline.

    Raises:
        PlanError: more stages than layers.
    """
    placement = shape.place(num_ranks)
    num_stages = placement.num_stages
    if num_stages > costs.num_layers:
        per_rank = shape.stages_per_rank
        stages = f"{num_stages} stages" + (f" ({per_rank} a rank)" if per_rank > 1 else "")
        raise PlanError(
            f"{stages} need at least {num_stages} layers, the model has {costs.num_layers}",
            remedy=f"use at most {costs.num_layers // per_rank or 1} worker(s) per pipeline, "
            "more replicas (parallel.data), or a deeper model",
        )
    factors = costs.rank_factor or (1.0,) * num_ranks
    if len(factors) != num_ranks:
        raise PlanError(
            f"the costs name {len(factors)} rank factors, a pipeline has {num_ranks} ranks",
            remedy="give one factor for each rank, or none",
        )
    if shape.kind is PlacementKind.LINE:
        by_stage = [factors[rank] for rank in placement.down]
        return partition(costs.work_s, num_stages, factors=by_stage)
    num_pairs = -(-num_stages // 2)
    if shape.kind is PlacementKind.V:
        by_pair = list(factors)
    else:
        by_pair = [max(factors[r], factors[num_ranks - 1 - r]) for r in range(num_pairs)]
    return partition_folded(costs.work_s, num_stages, factors=by_pair)


def memory_for(costs: LayerCosts, *, boundaries: Sequence[int], placement: Placement) -> Memory:
    """What micro-batches hold and ranks can hold, in bytes where both are known.

    Where they are not, a rank may hold as many micro-batches as 1F1B does (p; p + 1 with mirror, whose
    two streams meet), each counted in shares of the rank.

    Args:
        costs: of the layers and ranks.
        boundaries: index of the first layer of each stage.
        placement: stages on ranks.

    Raises:
        PlanError: the layers' states alone do not fit.
    """
    if not costs.memory_bytes or not any(costs.activation_bytes):
        lanes = placement.num_stages // placement.num_ranks
        both = placement.kind is PlacementKind.MIRROR
        return Memory.counted(placement, cap=placement.num_ranks * lanes + both)
    full = costs.per_stage(costs.activation_bytes, boundaries)
    kept = full
    if costs.recomputes:
        kept = tuple(map(min, costs.per_stage(costs.input_bytes, boundaries), full))
    states = costs.rank_state_bytes(boundaries, placement=placement)
    caps = [size - state for size, state in zip(costs.memory_bytes, states, strict=True)]
    for rank, cap in enumerate(caps):
        if cap <= 0:
            raise PlanError(
                f"rank {rank} has {costs.memory_bytes[rank] / 1e9:.1f} GB, its layers' states "
                f"take {states[rank] / 1e9:.1f} GB",
                remedy="use more ranks or a placement with one copy",
            )
    return Memory(kept=kept, full=full, caps=tuple(caps))


def one_f_one_b_s(
    costs: LayerCosts,
    *,
    num_ranks: int,
    replicas: Sequence[Sequence[int]],
    cores: int | None = None,
    overlap: bool = False,
) -> float | None:
    """Simulated step time of plain 1F1B: the yardstick.

    Args:
        costs: of the layers, links and ranks.
        num_ranks: of one pipeline.
        replicas: micro-batches of each gradient group, for each replica.
        cores: host cores that the ranks of one replica share.
        overlap: whether steps overlap.

    Returns:
        None where the model has fewer layers than ranks.
    """
    if costs.num_layers < num_ranks:
        return None
    shape = Shape(kind=PlacementKind.LINE)
    placement = shape.place(num_ranks)
    table = costs.table(
        fit_boundaries(costs, shape, num_ranks=num_ranks),
        placement=placement,
        num_replicas=len(replicas),
    )
    most = max(replicas, key=sum)
    schedule = build(
        "1f1b", placement=placement, directions=directions_of(most, num_directions=1)
    )
    timeline = simulate(schedule, table, cores=cores)
    return timeline.steady_s if overlap else timeline.makespan_s


def _candidate(
    costs: LayerCosts,
    shape: Shape,
    *,
    num_ranks: int,
    replicas: Sequence[Sequence[int]],
    boundaries: tuple[int, ...] | None,
    cores: int | None,
    overlap: bool,
    effort: int,
    seed: int,
) -> Candidate:
    placement = shape.place(num_ranks)
    if boundaries is None:
        boundaries = fit_boundaries(costs, shape, num_ranks=num_ranks)
    elif len(boundaries) != placement.num_stages:
        raise PlanError(
            f"{placement.num_stages} stages, pipeline.boundaries cuts {len(boundaries)}"
        )
    memory = memory_for(costs, boundaries=boundaries, placement=placement)
    table = costs.table(boundaries, placement=placement, num_replicas=len(replicas))
    ways = [directions_of(sizes, num_directions=placement.num_directions) for sizes in replicas]
    found: dict[object, SearchResult] = {}
    for directions in ways:
        if directions not in found:
            found[directions] = search(
                placement,
                directions=directions,
                costs=table,
                memory=memory,
                cores=cores,
                overlap=overlap,
                effort=effort,
                seed=seed,
            )
    slowest = max(found.values(), key=lambda result: result.makespan_s)
    return Candidate(
        shape=shape,
        boundaries=boundaries,
        schedules=tuple(found[directions].schedule for directions in ways),
        makespan_s=slowest.makespan_s,
        bubble=simulate(slowest.schedule, table, cores=cores).bubble,
        gap=slowest.gap if cores is None else None,
        peak_activations=max(slowest.peak_activations),
        weight_copies=placement.num_directions if num_ranks > 1 else 1,
        builder=slowest.builder,
        builder_makespan_s=slowest.builder_makespan_s,
    )


def peak_bytes(candidate: Candidate, costs: LayerCosts) -> float | None:
    """What the worst rank holds, states and activations; None where the sizes are not known.

    Args:
        candidate: of the same costs.
        costs: of the layers.
    """
    if not any(costs.activation_bytes):
        return None
    schedule = candidate.schedules[0]
    placement = schedule.placement
    full = costs.per_stage(costs.activation_bytes, candidate.boundaries)
    kept = full
    if costs.recomputes:
        kept = tuple(map(min, costs.per_stage(costs.input_bytes, candidate.boundaries), full))
    memory = Memory(kept=kept, full=full, caps=(float("inf"),) * placement.num_ranks)
    states = costs.rank_state_bytes(candidate.boundaries, placement=placement)
    return max(map(sum, zip(peaks(schedule, memory), states, strict=True)))
