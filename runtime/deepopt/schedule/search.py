"""Find an order for the costs, hops and memory at hand.

A portfolio of the classical orders, the list scheduler under many rules in the real costs, then the best
of those rebuilt from both ends in turns, and a local search on what that gives. The result is
verified, never slower than the best classical order under the simulator, and comes with a bound that
no order can beat. Deterministic: the same inputs and seed give the same order; effort is counted in
actions, not in seconds. The placement is given; choosing it is the planner's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepopt.errors import ScheduleError
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.builders import BUILDERS, build, misfit
from deepopt.schedule.coding import CodedProblem, Rows
from deepopt.schedule.forward_backward import ACTIONS_PER_ROUND, rebuild
from deepopt.schedule.ir import Direction, Placement, Schedule
from deepopt.schedule.list_scheduler import Order, fuse_first_stage
from deepopt.schedule.local_search import improve
from deepopt.schedule.memory import Memory, peaks
from deepopt.schedule.rule_search import search_rules
from deepopt.schedule.simulate import CostTable, simulate
from deepopt.schedule.step_end import StepEnd
from deepopt.schedule.verify import peak_activations, verify

DEFAULT_EFFORT = 1_000_000  # actions to schedule: about two seconds on one core
_EVALUATED_PER_SCHEDULED = 6
"""Actions that the local search evaluates while the list scheduler schedules one: 0.3 us against 2 us."""
_NUM_STARTS = 4  # orders that each improvement starts from
_NUM_FOUND = 8  # orders that are simulated: shared cores and full routes may choose another than the first
_FEWEST_ROUNDS = 3  # of rebuilding; fewer than that are not begun
_FEWEST_EVALUATIONS = (
    50  # fewer than that improve no order: the list scheduler's stay as they are
)

NAME = "searched"
"""The name of a schedule that no builder made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    Args:
        schedule: verified; its name is a builder's where none was found that is faster.
        makespan_s: its simulated step time; among others where steps overlap.
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
    memory: Memory | None = None,
    cores: int | None = None,
    overlap: bool = False,
    effort: int = DEFAULT_EFFORT,
    seed: int = 0,
) -> SearchResult:
    """Find a fast order on a placement.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage, rank and hop.
        memory_cap: most stage micro-batches in flight on a rank; None for any number.
        memory: instead of `memory_cap`: sizes by stage and capacities by rank.
        cores: host cores that the ranks share, as for `simulate`; None for a device each.
        overlap: whether each rank begins the next step when it has ended this one
            (pipeline.overlap_steps): then step times, and the bound, are those of a step among
            others.
        effort: actions to schedule, about two microseconds each: a quarter under rules, half in orders
            rebuilt, and for as long as another quarter takes the local search.
        seed: of the random choices.

    Raises:
        ScheduleError: nothing fits the memory.
    """
    memory = memory or Memory.counted(placement, cap=memory_cap)
    problem = CodedProblem(placement, directions=directions, costs=costs, memory=memory)
    bound_s = lower_bound_s(placement, directions=directions, costs=costs, memory=memory)
    step_end = StepEnd(problem, overlap=overlap)
    order_bound_s = (  # of what the list scheduler sees: no updates
        bound_s
        if not costs.update_s
        else lower_bound_s(
            placement,
            directions=directions,
            costs=replace(costs, update_s=(), reduce_s=()),
            memory=memory,
        )
    )
    if overlap:
        bound_s = step_end.least_s

    def seconds(schedule: Schedule) -> float:
        timeline = simulate(schedule, costs, cores=cores)
        return timeline.steady_s if overlap else timeline.makespan_s

    classical = _classical(placement, directions, memory)
    timed = [(seconds(schedule), schedule) for schedule in classical]
    best_s, best = builder_s, builder = min(
        timed, key=lambda entry: entry[0], default=(float("inf"), None)
    )
    for rows in _found(
        problem,
        step_end,
        classical,
        bound_s=bound_s,
        order_bound_s=order_bound_s,
        effort=effort,
        seed=seed,
    ):
        schedule = _named(placement, directions, fuse_first_stage(problem.decode(rows)))
        makespan_s = seconds(schedule)
        if makespan_s < best_s:
            best_s, best = makespan_s, schedule
    if overlap and best is not None:
        bound_s = max(simulate(best, costs).busy_s)  # the same for every order
    if best is None:
        raise ScheduleError(
            f"no order of {len(directions)} micro-batches fits the memory of "
            f"{_cap_text(memory, memory_cap)}",
            remedy="raise the memory cap, use smaller micro-batches or more ranks",
        )
    verify(best, memory=memory)
    return SearchResult(
        schedule=best,
        makespan_s=best_s,
        lower_bound_s=bound_s,
        builder=None if builder is None else builder.name,
        builder_makespan_s=builder_s,
        peak_activations=peak_activations(best),
    )


def _found(
    problem: CodedProblem,
    step_end: StepEnd,
    classical: Sequence[Schedule],
    *,
    bound_s: float,
    order_bound_s: float,
    effort: int,
    seed: int,
) -> list[Rows]:
    """Orders of the list scheduler and of the local search, in the order in which to try them."""
    coded = []
    for schedule in classical:
        rows = problem.encode(schedule)
        coded.append((_seconds(problem, step_end, rows), rows))
    coded.sort(key=lambda entry: entry[0])
    if coded and coded[0][0] <= bound_s * (1 + 1e-9):
        return [coded[0][1]]  # with R ahead of its gradient, a builder's order is the best
    try:
        listed = search_rules(
            problem, effort=effort // 4, seed=seed, bound_s=order_bound_s, keep=_NUM_STARTS
        )
    except ScheduleError:
        listed = []  # the memory does not hold one micro-batch of each stream; no rule helps
    coded += [(_seconds(problem, step_end, entry.rows), entry.rows) for entry in listed]
    for improve_one, share, fewest in (
        (rebuild, effort // 2, _FEWEST_ROUNDS * ACTIONS_PER_ROUND),
        (improve, effort // 4 * _EVALUATED_PER_SCHEDULED, _FEWEST_EVALUATIONS),
    ):
        coded.sort(key=lambda entry: entry[0])
        starts = [rows for _, rows in coded[:_NUM_STARTS]]
        fewest *= problem.num_actions
        # A while for each, then as long as for all of them for the best: many a start leads nowhere.
        if not starts or share // 2 < fewest:
            continue
        if share // 2 < fewest * len(starts):
            starts = starts[:1]
        for turn in range(len(starts) + 1):
            if coded[0][0] <= bound_s * (1 + 1e-9):
                break
            is_last = turn == len(starts)
            start = coded[0][1] if is_last else starts[turn]
            better = improve_one(
                problem,
                start,
                effort=share // 2 if is_last else share // 2 // len(starts),
                seed=seed + turn,
                target_s=bound_s,
                step_end=step_end,
            )
            if better != start:
                coded.append((_seconds(problem, step_end, better), better))
                coded.sort(key=lambda entry: entry[0])
    return [rows for _, rows in coded[:_NUM_FOUND]]


def _seconds(problem: CodedProblem, step_end: StepEnd, rows: Rows) -> float:
    ends = problem.ends(rows)
    assert ends is not None, "searches make orders that run"
    return step_end.seconds(rows, ends)


def _cap_text(memory: Memory, memory_cap: int | None) -> str:
    if memory_cap is not None:
        return f"{memory_cap} stage micro-batches per rank"
    return f"{min(memory.caps):g} to {max(memory.caps):g} per rank"


def _named(placement: Placement, directions: Sequence[Direction], order: Order) -> Schedule:
    return Schedule(name=NAME, placement=placement, directions=tuple(directions), actions=order)


def _classical(
    placement: Placement, directions: Sequence[Direction], memory: Memory
) -> list[Schedule]:
    """Every builder's order that fits the placement and the memory."""
    schedules = [
        build(name, placement=placement, directions=directions)
        for name in BUILDERS
        if misfit(name, placement=placement) is None
    ]
    return [s for s in schedules if fits(s, memory)]


def fits(schedule: Schedule, memory: Memory) -> bool:
    """Whether a schedule stays within the memory of every rank.

    Args:
        schedule: compute actions per rank.
        memory: sizes by stage and capacities by rank.
    """
    return all(
        peak <= cap * (1 + 1e-9)
        for peak, cap in zip(peaks(schedule, memory), memory.caps, strict=True)
    )
