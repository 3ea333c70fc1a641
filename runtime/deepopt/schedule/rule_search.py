"""Rules for the list scheduler: the ones worth trying, and better ones found from those.

The scheduler decides in time of the real costs, but greedily; what it cannot see is how many
micro-batches each stage should have in flight. So that is what is searched: first over families
of caps, then by changes to the best. Pure; deterministic by its seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deepopt.schedule.coding import CodedProblem, Rows
from deepopt.schedule.ir import Direction, Op, Placement
from deepopt.schedule.list_scheduler import ListRules, Prefer, list_codes

_GOOD_SHARE = 1e-4  # so close to the bound, more search is waste
_SAME = 1e-9  # of a makespan
_NUM_PARENTS = 3  # orders whose rules are changed
_SLACKS = (0, 1, 2, 4)  # micro-batches in flight over what a round trip needs
_STRETCHES = (1.0, 1.25, 1.5, 2.0)  # of a round trip


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """An order that the list scheduler made.

    Args:
        makespan_s: end of its last action; routes never fill up here.
        rows: codes per rank.
    """

    makespan_s: float
    rows: Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What is searched over: the fields of `ListRules` of the same names; caps by stage."""

    caps: tuple[int, ...]
    forward: Prefer
    backward: Prefer
    forward_first: bool
    weight_backlog: int | None
    weight_patience: float
    prepare_first: bool


def search_rules(
    problem: CodedProblem, *, effort: int, seed: int, bound_s: float, keep: int
) -> list[Listed]:
    """The best orders of the list scheduler, the best one first.

    Args:
        problem: placement, directions, costs and memory.
        effort: actions to schedule, at least one order's.
        seed: of the random choices.
        bound_s: no order is faster: the search ends when it is reached.
        keep: how many orders to return at most; no two of them take the same time.

    Raises:
        ScheduleError: the memory does not hold one micro-batch of each stream.
    """
    chance = random.Random(seed)
    tries = max(1, effort // problem.num_actions)
    choices = list(_choices(problem))
    chance.shuffle(choices)
    found: list[tuple[float, int, _Choice, Rows]] = []

    def attempt(choice: _Choice) -> float:
        rows, makespan_s = list_codes(
            problem.placement, directions=problem.directions, rules=_rules(problem, choice)
        )
        # Orders that take the same time are mostly the same order.
        if any(abs(makespan_s - one[0]) <= _SAME * makespan_s for one in found):
            return makespan_s
        found.append((makespan_s, len(found), choice, rows))
        found.sort(key=lambda entry: entry[:2])
        del found[keep:]
        return makespan_s

    enough = bound_s * (1 + _GOOD_SHARE)
    for choice in choices[: max(1, (tries + 1) // 2)]:
        tries -= 1
        if attempt(choice) <= enough:
            break
    while tries > 0 and found[0][0] > enough:
        tries -= 1
        parent = found[chance.randrange(min(_NUM_PARENTS, len(found)))][2]
        attempt(_changed(parent, problem, chance))
    return [Listed(makespan_s=entry[0], rows=entry[3]) for entry in found]


def _rules(problem: CodedProblem, choice: _Choice) -> ListRules:
    costs = problem.costs
    factor = costs.rank_factor or (1.0,) * problem.placement.num_ranks
    return ListRules(
        duration=lambda stage, op, rank: costs.duration_s(stage, op=op) * factor[rank],
        cap=lambda stage, direction: choice.caps[stage],
        split=True,
        hop=lambda source, target: costs.hop_between(source, target=target),
        memory=problem.memory if problem.memory.is_limited else None,
        forward=choice.forward,
        backward=choice.backward,
        forward_first=choice.forward_first,
        weight_backlog=choice.weight_backlog,
        weight_patience=choice.weight_patience,
        prepare_first=choice.prepare_first,
    )


def _choices(problem: CodedProblem) -> Iterator[_Choice]:
    """Every combination of caps and preferences worth trying."""
    prepares = (True, False) if any(problem.has_prepare) else (True,)
    for caps, forward, backward, forward_first, backlog, patience, prepare in itertools.product(
        _caps(problem),
        Prefer,
        (Prefer.EARLIEST, Prefer.DEEPEST),
        (False, True),
        (None, 2, 3),
        (0.0, 0.5),
        prepares,
    ):
        yield _Choice(
            caps=caps,
            forward=forward,
            backward=backward,
            forward_first=forward_first,
            weight_backlog=backlog,
            weight_patience=patience,
            prepare_first=prepare,
        )


def _caps(problem: CodedProblem) -> Sequence[tuple[int, ...]]:
    """Micro-batches in flight per stage: as in 1F1B, as a round trip needs, and any number."""
    placement, count = problem.placement, problem.count
    num_stages, per_rank = placement.num_stages, placement.num_stages // placement.num_ranks
    left = [num_stages - stage for stage in range(num_stages)]
    choices: list[Sequence[float]] = [
        left,
        [n + 1 for n in left],
        [-(-n // per_rank) for n in left],
        [-(-3 * n // (2 * per_rank)) for n in left],
        [placement.num_ranks] * num_stages,
        [count] * num_stages,
    ]
    trips = _round_trips(problem)
    choices += [[trip * stretch + 1 for trip in trips] for stretch in _STRETCHES]
    choices += [[trip + 1 + slack for trip in trips] for slack in _SLACKS]
    capped = [tuple(max(1, min(int(n), count)) for n in choice) for choice in choices]
    return list(dict.fromkeys(capped))


def _round_trips(problem: CodedProblem) -> list[float]:
    """Micro-batches that enter a stage while one of them goes to the last stage and back."""
    placement, costs = problem.placement, problem.costs
    directions = dict.fromkeys(problem.directions)
    factor = costs.rank_factor or (1.0,) * placement.num_ranks
    work = [0.0] * placement.num_ranks
    for direction in problem.directions:
        for stage in range(placement.num_stages):
            rank = placement.rank_of(stage, direction)
            work[rank] += factor[rank] * sum(
                costs.duration_s(stage, op=op) for op in (Op.F, Op.R, Op.I, Op.W)
            )
    interval = max(work) / problem.count * len(directions)
    direction = next(iter(directions))
    trips = [0.0] * placement.num_stages
    trip = 0.0
    for stage in reversed(range(placement.num_stages)):
        rank = placement.rank_of(stage, direction)
        trip += factor[rank] * sum(costs.duration_s(stage, op=op) for op in (Op.F, Op.R, Op.I))
        trip += 2 * _hop_after(placement, stage, direction, problem)
        own = factor[rank] * costs.duration_s(stage, op=Op.W)
        trips[stage] = (trip + own) / interval if interval > 0 else 0.0
    return trips


def _hop_after(
    placement: Placement, stage: int, direction: Direction, problem: CodedProblem
) -> float:
    if stage == placement.num_stages - 1:
        return 0.0
    source, target = (placement.rank_of(s, direction) for s in (stage, stage + 1))
    return problem.costs.hop_between(source, target=target)


def _changed(choice: _Choice, problem: CodedProblem, chance: random.Random) -> _Choice:
    """The choice with the caps of some neighbouring stages, or one preference, changed."""
    kind = chance.randrange(8)
    if kind == 0:
        return replace(choice, weight_backlog=chance.choice((None, 1, 2, 3, 4, 6)))
    if kind == 1:
        return replace(choice, weight_patience=chance.choice((0.0, 0.25, 0.5, 0.75, 1.0)))
    if kind == 2:
        return replace(choice, forward=chance.choice(list(Prefer)))
    if kind == 3:
        changes = (
            {"forward_first": not choice.forward_first},
            {"backward": chance.choice((Prefer.EARLIEST, Prefer.DEEPEST))},
            {"prepare_first": not choice.prepare_first},
        )
        return replace(choice, **chance.choice(changes))
    num_stages = len(choice.caps)
    first = chance.randrange(num_stages)
    end = min(num_stages, first + 1 + chance.randrange(max(1, num_stages // 2)))
    step = chance.choice((-2, -1, 1, 2))
    caps = [
        max(1, min(problem.count, cap + step)) if first <= stage < end else cap
        for stage, cap in enumerate(choice.caps)
    ]
    return replace(choice, caps=tuple(caps))
