"""Orders for one pipeline side by side: built or searched, judged alike, the best one first.

Pure and deterministic. Costs come from outside (`Pipeline`), effort is counted in actions. What does
not fit groups, layers or memory is left out with its reason. It decides by simulated time:
a second copy of the weights pays its exchange and its update there, and its memory is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from deepopt.errors import DeepoptError, PlanError, ScheduleError
from deepopt.planner.cut import Cut
from deepopt.planner.orders import KeptOrder, Known, input_key
from deepopt.planner.outcome import SEARCHED, Candidate, Misfit, Outcome, judge
from deepopt.planner.shapes import SHAPES, Shape, shapes
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import Direction, PlacementKind, Schedule
from deepopt.schedule.search import SearchResult, fits, search
from deepopt.schedule.verify import peak_activations

YARDSTICK = "1f1b"
LAUNCH_EFFORT = 200_000
"""Actions a placement: about two seconds for all of p=4, m=8 on one core."""

_FINALISTS = 2  # placements that are searched a second time, longer
_TRIAL_SHARE = 20  # of the effort goes into the trial of each cut, where there are several
_SEARCH_VERSION = 8  # +1 when the same inputs may give another order


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
                cut=outcome.cut,
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
        effort: actions to schedule or evaluate for each search, on average: the best two of many get
            more of it.
        seed: of the random choices.
        progress: told what is being tried.
        known: orders that were searched before, by their keys.

    Raises:
        PlanError: nothing fits; names the reason of each candidate.
    """
    found: list[tuple[Candidate, Outcome]] = []
    left_out: list[tuple[Candidate, str]] = []
    several = sum(candidate.schedule == SEARCHED for candidate in tried) > 2 * _FINALISTS
    first = effort // 2 if several else effort
    for index, candidate in enumerate(tried, start=1):
        if progress is not None:
            progress(f"{index} of {len(tried)}: {candidate.schedule}, {candidate.shape}")
        result = evaluate(pipeline, candidate=candidate, effort=first, seed=seed, known=known)
        if isinstance(result, Misfit):
            left_out.append((candidate, result.reason))
        else:
            found.append((candidate, result))
    if several:
        # What the others did not use goes to those that may win.
        found.sort(key=lambda entry: entry[1].preference)
        places = [i for i, (one, _) in enumerate(found) if one.schedule == SEARCHED]
        spared = (effort - first) * (len(tried) - len(left_out))
        for place in places[:_FINALISTS]:
            candidate, before = found[place]
            if progress is not None:
                progress(f"searching on: {candidate.shape}")
            again = evaluate(
                pipeline,
                candidate=candidate,
                effort=max(effort, spared // _FINALISTS),
                seed=seed,
                known=known,
            )
            if isinstance(again, Outcome) and again.preference < before.preference:
                found[place] = candidate, again
    if not found:
        shapes: dict[str, list[str]] = {}  # a layer that fits nowhere fits none of them
        for candidate, reason in left_out:
            shapes.setdefault(reason, []).append(f"{candidate.shape}")
        reasons = (f"{', '.join(dict.fromkeys(own))}: {why}" for why, own in shapes.items())
        raise PlanError(
            f"no placement fits: {'; '.join(reasons)}",
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


def _none(key: str) -> None:
    """Nothing is known."""


def _built(pipeline: Pipeline, candidate: Candidate) -> Outcome:
    placement = pipeline.place(candidate.shape)
    ways = pipeline.directions(placement)
    orders = {
        directions: build(candidate.schedule, placement=placement, directions=directions)
        for directions in dict.fromkeys(ways)
    }
    schedules = [orders[directions] for directions in ways]
    outcomes = [_judged(pipeline, cut, schedules) for cut in pipeline.cuts(candidate.shape)]
    found = [outcome for outcome in outcomes if outcome is not None]
    if not found:
        raise _too_many(pipeline, candidate.shape, schedules[0])
    return min(found, key=lambda outcome: outcome.preference)


def _searched(
    pipeline: Pipeline, shape: Shape, *, effort: int, seed: int, known: Known
) -> Outcome:
    placement = pipeline.place(shape)
    ways = pipeline.directions(placement)
    keys = {
        directions: _key(pipeline, shape, directions, effort=effort, seed=seed)
        for directions in dict.fromkeys(ways)
    }
    kept = [known(key) for key in keys.values()]
    found = [one for one in kept if one is not None and one.cut is not None]
    if len(found) < len(kept) or any(one.cut != found[0].cut for one in found):
        found = _search_cuts(pipeline, shape, tuple(keys), effort=effort, seed=seed)
    cut = found[0].cut
    assert cut is not None, "a search is for a cut"
    orders = dict(zip(keys, found, strict=True))
    in_places = [_in_places(orders[directions].schedule, cut) for directions in ways]
    outcome = _judged(pipeline, cut, in_places, are_verified=True)
    assert outcome is not None, "searches keep to the memory"
    return replace(
        outcome,
        keys=tuple(keys[directions] for directions in ways),
        best_builder=orders[outcome.schedule.directions].builder,
    )


def _in_places(schedule: Schedule, cut: Cut) -> Schedule:
    """A schedule by position, from one by rank."""
    if not cut.order:
        return schedule
    position = sorted(range(len(cut.order)), key=lambda at: cut.order[at])
    return schedule.on_ranks(position)


def _search_cuts(
    pipeline: Pipeline,
    shape: Shape,
    ways: Sequence[tuple[Direction, ...]],
    *,
    effort: int,
    seed: int,
) -> list[KeptOrder]:
    """An order for each way that micro-batches go, on the cut that a short search likes best."""
    cuts = pipeline.cuts(shape)
    problems: list[DeepoptError] = []
    tried: list[tuple[float, int, list[SearchResult]]] = []
    if len(cuts) > 1:
        for index, cut in enumerate(cuts):
            try:
                results = _search_all(
                    pipeline, shape, cut, ways, effort=effort // _TRIAL_SHARE, seed=seed
                )
            except (PlanError, ScheduleError) as problem:
                problems.append(problem)
                continue
            tried.append((max(r.makespan_s for r in results), index, results))
        if not tried:
            raise problems[0]
        tried.sort(key=lambda entry: entry[:2])
    chosen = tried[0][1] if tried else 0
    results = _search_all(pipeline, shape, cuts[chosen], ways, effort=effort, seed=seed)
    if tried and tried[0][0] < max(r.makespan_s for r in results):
        results = tried[0][2]
    order = cuts[chosen].order
    return [
        KeptOrder(
            schedule=result.schedule.on_ranks(order) if order else result.schedule,
            cut=cuts[chosen],
            builder=result.builder,
        )
        for result in results
    ]


def _search_all(
    pipeline: Pipeline,
    shape: Shape,
    cut: Cut,
    ways: Sequence[tuple[Direction, ...]],
    *,
    effort: int,
    seed: int,
) -> list[SearchResult]:
    placement = pipeline.place(shape)
    table = pipeline.table(cut, placement=placement)
    memory = pipeline.memory(cut, placement=placement)
    return [
        search(
            placement,
            directions=directions,
            costs=table,
            memory=memory,
            cores=pipeline.cores_of_a_replica,
            overlap=pipeline.overlap,
            effort=effort,
            seed=seed,
        )
        for directions in ways
    ]


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
    pipeline: Pipeline, cut: Cut, schedules: Sequence[Schedule], *, are_verified: bool = False
) -> Outcome | None:
    """What the orders of all replicas, by position, take; the slowest one sets the figures.

    None where one of them does not fit the memory.
    """
    placement = schedules[0].placement
    table = pipeline.table(cut, placement=placement)
    memory = pipeline.memory(cut, placement=placement)
    distinct = tuple(dict.fromkeys(schedules))
    if not all(fits(order, memory) for order in distinct):
        return None
    if cut.order:
        placement = placement.on_ranks(cut.order)
        schedules = [order.on_ranks(cut.order) for order in schedules]
        distinct = tuple(dict.fromkeys(schedules))
        layers = pipeline.layers.recomputing(cut.again)
        table = layers.table(
            cut.boundaries, placement=placement, num_replicas=len(pipeline.replicas)
        )
        back = sorted(range(len(cut.order)), key=lambda at: cut.order[at])
        memory = replace(memory, caps=tuple(memory.caps[at] for at in back))
    outcomes = [
        judge(
            order,
            costs=table,
            memory=memory,
            cores=pipeline.cores_of_a_replica,
            overlap=pipeline.overlap,
            is_verified=are_verified,
        )
        for order in distinct
    ]
    slowest = max(outcomes, key=lambda outcome: outcome.step_s)
    return replace(slowest, cut=cut, schedules=tuple(schedules))


def _too_many(pipeline: Pipeline, shape: Shape, schedule: Schedule) -> ScheduleError:
    """A built order holds more than a rank can."""
    placement = pipeline.place(shape)
    share = placement.num_ranks / placement.num_stages
    held = max(peak_activations(schedule)) * share
    words = f"holds activations of {held:g} micro-batches on a rank"
    if pipeline.layers.knows_memory:
        return ScheduleError(f"{words}, which its memory does not")
    memory = pipeline.memory(pipeline.cuts(shape)[0], placement=placement)
    return ScheduleError(f"{words}, the cap is {max(memory.caps) * share:g}")
