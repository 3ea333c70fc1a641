"""Find an order for the costs, hops and memory at hand.

A portfolio of the classical orders, the list scheduler under many rules in the real costs, then a
local search on the best. The result is verified, never slower than the best classical order under
the simulator, and comes with a bound that no order can beat. Deterministic: the same inputs and
seed give the same order; effort is counted in actions, not in seconds. The placement is given;
choosing it is the planner's affair.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.ir import Direction, Op, Placement, Schedule
from deepopt.schedule.list_scheduler import (
    ListRules,
    Order,
    deepest,
    earliest,
    fewest,
    fuse_first_stage,
    list_schedule,
)
from deepopt.schedule.local_search import CodedProblem, improve
from deepopt.schedule.simulate import CostTable, simulate
from deepopt.schedule.verify import peak_activations, verify

DEFAULT_EFFORT = 1_000_000  # actions to schedule or evaluate: seconds on one core
_NUM_STARTS = 3  # orders that the local search starts from

NAME = "searched"
"""The name of a schedule that no builder made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Args:
        schedule: verified; its name is a builder's where none was found that is faster.
        makespan_s: its simulated step time.
        lower_bound_s: no order of this placement is faster.
        builder: the fastest classical order that fits the memory; None when none does.
        builder_makespan_s: its simulated step time; infinite when none fits.
        peak_activations: stage micro-batches in flight per rank.
    """

    schedule: Schedule
    makespan_s: float
    lower_bound_s: float
    builder: str | None
    builder_makespan_s: float
    peak_activations: tuple[int, ...]

    @property
    def gap(self) -> float:
        """How much slower than the bound, as a share of it; the best order may lie between."""
        return self.makespan_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0


def search(
    placement: Placement,
    *,
    directions: Sequence[Direction],
    costs: CostTable,
    memory_cap: int | None = None,
    effort: int = DEFAULT_EFFORT,
    seed: int = 0,
) -> SearchResult:
    """Find a fast order on a placement.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage, rank and hop.
        memory_cap: most stage micro-batches in flight on a rank; None for any number.
        effort: actions to schedule or evaluate, half of them in the local search.
        seed: of the random choices.

    Raises:
        ScheduleError: nothing fits the memory.
    """
    problem = CodedProblem(placement, directions=directions, costs=costs)
    classical = _classical(placement, directions, memory_cap)
    timed = [(simulate(schedule, costs).makespan_s, schedule) for schedule in classical]
    builder_s, builder = min(timed, key=lambda entry: entry[0], default=(float("inf"), None))

    num_tries = max(1, effort // 2 // len(problem.actions))
    orders = [schedule.actions for schedule in classical]
    orders += _listed(placement, directions, costs, memory_cap, num_tries, seed)
    coded = []
    for order in orders:
        rows = problem.encode(_named(placement, directions, order))
        ends = problem.ends(rows)
        assert ends is not None, "builders and the list scheduler make orders that run"
        coded.append((max(ends), rows))
    if not coded:
        raise ScheduleError(
            f"no order of {len(directions)} micro-batches fits a memory of {memory_cap} stage "
            "micro-batches per rank",
            remedy="raise the memory cap, use smaller micro-batches or more ranks",
        )
    coded.sort(key=lambda entry: entry[0])
    starts = coded[:_NUM_STARTS]
    found = [rows for _, rows in starts]
    found += [
        improve(
            problem,
            rows,
            memory_cap=memory_cap,
            effort=effort // 2 // len(starts),
            seed=seed + index,
        )
        for index, (_, rows) in enumerate(starts)
    ]
    best_s, best = builder_s, builder
    for rows in found:
        order = fuse_first_stage(problem.decode(rows))
        schedule = _named(placement, directions, order)
        makespan_s = simulate(schedule, costs).makespan_s
        if makespan_s < best_s:
            best_s, best = makespan_s, schedule
    assert best is not None, "a search that has a start has an end"
    verify(best, memory_cap=memory_cap)
    return SearchResult(
        schedule=best,
        makespan_s=best_s,
        lower_bound_s=lower_bound_s(placement, directions=directions, costs=costs),
        builder=None if builder is None else builder.name,
        builder_makespan_s=builder_s,
        peak_activations=peak_activations(best),
    )


def _named(placement: Placement, directions: Sequence[Direction], order: Order) -> Schedule:
    return Schedule(name=NAME, placement=placement, directions=tuple(directions), actions=order)


def _classical(
    placement: Placement, directions: Sequence[Direction], memory_cap: int | None
) -> list[Schedule]:
    """Every builder's order that fits the placement and the memory."""
    schedules = [
        build(name, placement=placement, directions=directions)
        for name in BUILDERS
        if misfit(name, placement=placement) is None
    ]
    return [
        s for s in schedules if memory_cap is None or max(peak_activations(s)) <= memory_cap
    ]


def _listed(
    placement: Placement,
    directions: Sequence[Direction],
    costs: CostTable,
    memory_cap: int | None,
    num_tries: int,
    seed: int,
) -> Iterator[Order]:
    """The list scheduler's orders under up to so many rules, in a random order of the rules."""
    rules = list(_rules(placement, len(directions), costs, memory_cap))
    random.Random(seed).shuffle(rules)
    for rule in rules[:num_tries]:
        try:
            yield list_schedule(placement, directions=directions, rules=rule)
        except ScheduleError:
            return  # the memory does not hold one micro-batch of each stream; no rule helps


def _rules(
    placement: Placement, num_microbatches: int, costs: CostTable, memory_cap: int | None
) -> Iterator[ListRules]:
    """Every combination of caps and preferences worth trying."""
    durations = {
        op: [costs.duration_s(stage, op=op) for stage in range(placement.num_stages)]
        for op in (Op.F, Op.I, Op.W)
    }
    factor = costs.rank_factor or (1.0,) * placement.num_ranks
    ways = [placement.down, *(() if placement.up is None else (placement.up,))]
    longest_hop_s = max(
        (costs.hop_between(a, target=b) for way in ways for a, b in itertools.pairwise(way)),
        default=0.0,
    )
    for caps, forward, backward, forward_first, backlog, patience in itertools.product(
        _caps(placement, num_microbatches),
        (deepest, earliest, fewest),
        (earliest, deepest),
        (False, True),
        (None, 2, 3),
        (0.0, 0.5),
    ):
        yield ListRules(
            duration=lambda stage, op, rank: durations[op][stage] * factor[rank],
            cap=lambda stage, direction, caps=caps: caps[stage],  # type: ignore[misc]
            split=True,
            latency=longest_hop_s,
            rank_cap=memory_cap,
            forward_key=forward,
            backward_key=backward,
            forward_first=forward_first,
            weight_backlog=backlog,
            weight_patience=patience,
        )


def _caps(placement: Placement, num_microbatches: int) -> Sequence[tuple[int, ...]]:
    """Micro-batches in flight per stage: as in 1F1B, more, fewer, and any number."""
    num_stages, per_rank = placement.num_stages, placement.num_stages // placement.num_ranks
    left = [num_stages - stage for stage in range(num_stages)]
    choices = (
        left,
        [n + 1 for n in left],
        [-(-n // per_rank) for n in left],
        [-(-3 * n // (2 * per_rank)) for n in left],
        [placement.num_ranks] * num_stages,
        [num_microbatches] * num_stages,
    )
    capped = [tuple(min(n, num_microbatches) for n in choice) for choice in choices]
    return list(dict.fromkeys(capped))
