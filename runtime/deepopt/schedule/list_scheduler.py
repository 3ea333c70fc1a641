"""An event-driven list scheduler: an idle rank starts the best action that it may start.

It builds the orders that have no closed form. The streams it works on are *lanes*: one stage in
one direction, whose micro-batches pass forward and backward in ascending order, so gradients
are added in micro-batch order by construction. Each lane has its own cap on micro-batches in
flight; a cap of its own, not a shared one, is why no order can starve: the deepest micro-batch
in flight may always go on. It does not verify (see `verify`) and knows no particular schedule
(see `builders`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deepopt.schedule.ir import Action, Direction, Op, Placement

Order = tuple[tuple[Action, ...], ...]
"""Actions per rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRules:
    """What the scheduler may do and what it prefers.

    Args:
        duration: duration(stage, op, rank) in any unit of time; op is F, I, W or B.
        cap: cap(stage, direction): micro-batches in flight in this lane, from the start of F to
            the end of its last gradient; at least 1.
        split: True for I and W apart, W filling the gaps; False for B.
        latency: from the end of an action to its arrival on another rank.
        forward_key: forward_key(stage, direction): among forwards that may start, the smallest
            key starts; None prefers the deepest stage.
    """

    duration: Callable[[int, Op, int], float]
    cap: Callable[[int, Direction], int]
    split: bool
    latency: float = 0.0
    forward_key: Callable[[int, Direction], float] | None = None


@dataclass(slots=True, kw_only=True)
class _Lane:
    """One stage in one direction: its micro-batches and how far each of its ops has come."""

    stage: int
    rank: int
    cap: int
    microbatches: tuple[int, ...]
    members: frozenset[int]
    forward_key: float
    forward_at: list[float] = field(default_factory=list)  # arrival of each F's input
    backward_at: list[float] = field(default_factory=list)  # arrival of each B's gradient
    num_forward: int = 0
    num_backward: int = 0
    num_weight: int = 0
    before: _Lane | None = None
    after: _Lane | None = None


def list_schedule(
    placement: Placement,
    *,
    directions: Sequence[Direction],
    rules: ListRules,
    prefix: Order | None = None,
) -> Order:
    """Order the work of every rank by always starting the best action that may start.

    A backward goes before a forward, the one that waited longest first; W fills the gaps.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        rules: durations, caps and preferences.
        prefix: what each rank does first, in this order, before it chooses freely; it must
            leave each lane's micro-batches in ascending order and be free of deadlock.
    """
    lanes = _lanes(placement, directions, rules)
    actions: list[list[Action]] = [[] for _ in range(placement.num_ranks)]
    scripts = [iter(row) for row in (prefix or ((),) * placement.num_ranks)]
    fixed = [next(script, None) for script in scripts]
    free_at = [0.0] * placement.num_ranks
    wake = [(0.0, rank) for rank in range(placement.num_ranks)]
    while wake:
        now, rank = heapq.heappop(wake)
        if free_at[rank] > now:
            continue
        forced = fixed[rank]
        if forced is None:
            choice = _choose(lanes[rank], now, rules.split)
        else:
            choice = _follow(lanes[rank], now, forced)
        if choice is None:
            continue
        if forced is not None:
            fixed[rank] = next(scripts[rank], None)
        lane, op = choice
        end = now + rules.duration(lane.stage, op, rank)
        actions[rank].append(Action(lane.stage, op, _advance(lane, op)))
        free_at[rank] = end
        heapq.heappush(wake, (end, rank))
        for target, arrival in _deliver(lane, op, end, rules.latency):
            heapq.heappush(wake, (arrival, target))
    return tuple(map(tuple, actions))


def keep_microbatches(order: Sequence[Sequence[Action]], num_microbatches: int) -> Order:
    """Leave out the actions of micro-batches that are not there: what stays is still in order.

    Args:
        order: actions per rank, for at least this many micro-batches.
        num_microbatches: those to keep, from 0 on.
    """
    return tuple(
        tuple(a for a in row if a.microbatch is not None and a.microbatch < num_microbatches)
        for row in order
    )


def fuse_first_stage(order: Order) -> Order:
    """Replace each I of stage 0 that its own W follows at once by one B: less overhead.

    Only there: of every other stage the I comes apart, so that its gradient leaves before W.

    Args:
        order: actions per rank.
    """
    rows: list[tuple[Action, ...]] = []
    for row in order:
        fused: list[Action] = []
        for action in row:
            last = fused[-1] if fused else None
            if (
                action.op is Op.W
                and last is not None
                and last.op is Op.I
                and action.stage == 0
                and (last.stage, last.microbatch) == (action.stage, action.microbatch)
            ):
                fused[-1] = Action(action.stage, Op.B, action.microbatch)
            else:
                fused.append(action)
        rows.append(tuple(fused))
    return tuple(rows)


def _lanes(
    placement: Placement, directions: Sequence[Direction], rules: ListRules
) -> list[list[_Lane]]:
    by_rank: list[list[_Lane]] = [[] for _ in range(placement.num_ranks)]
    for direction in Direction:
        microbatches = tuple(m for m, d in enumerate(directions) if d is direction)
        members = frozenset(microbatches)
        previous: _Lane | None = None
        for stage in range(placement.num_stages if microbatches else 0):
            unknown = [float("inf")] * len(microbatches)
            lane = _Lane(
                stage=stage,
                rank=placement.rank_of(stage, direction),
                cap=max(1, rules.cap(stage, direction)),
                microbatches=microbatches,
                members=members,
                forward_key=-stage
                if rules.forward_key is None
                else rules.forward_key(stage, direction),
                forward_at=[0.0] * len(microbatches) if previous is None else list(unknown),
                backward_at=unknown,
                before=previous,
            )
            if previous is not None:
                previous.after = lane
            by_rank[lane.rank].append(lane)
            previous = lane
    return by_rank


def _choose(lanes: Sequence[_Lane], now: float, split: bool) -> tuple[_Lane, Op] | None:
    backward: _Lane | None = None
    forward: _Lane | None = None
    weight: _Lane | None = None
    for lane in lanes:
        if (
            lane.num_backward < lane.num_forward
            and (arrival := lane.backward_at[lane.num_backward]) <= now
            and (backward is None or arrival < backward.backward_at[backward.num_backward])
        ):
            backward = lane
        done = lane.num_weight if split else lane.num_backward
        if (
            lane.num_forward < len(lane.microbatches)
            and lane.forward_at[lane.num_forward] <= now
            and lane.num_forward - done < lane.cap
            and (forward is None or lane.forward_key < forward.forward_key)
        ):
            forward = lane
        if (
            split
            and lane.num_weight < lane.num_backward
            and (weight is None or _pending(lane) > _pending(weight))
        ):
            weight = lane
    if backward is not None:
        return backward, Op.I if split else Op.B
    if forward is not None:
        return forward, Op.F
    return None if weight is None else (weight, Op.W)


def _follow(lanes: Sequence[_Lane], now: float, action: Action) -> tuple[_Lane, Op] | None:
    """The lane of a fixed action when it may start now."""
    for lane in lanes:
        if lane.stage == action.stage and action.microbatch in lane.members:
            break
    else:
        raise AssertionError(f"{action} is not on the rank that its order gives it to")
    if action.op is Op.F:
        at = lane.forward_at[lane.num_forward]
    elif action.op is Op.W:
        at = 0.0 if lane.num_weight < lane.num_backward else float("inf")
    else:
        at = lane.backward_at[lane.num_backward]
    return (lane, action.op) if at <= now else None


def _pending(lane: _Lane) -> int:
    return lane.num_backward - lane.num_weight


def _advance(lane: _Lane, op: Op) -> int:
    if op is Op.F:
        lane.num_forward += 1
        return lane.microbatches[lane.num_forward - 1]
    if op is Op.W:
        lane.num_weight += 1
        return lane.microbatches[lane.num_weight - 1]
    lane.num_weight += op is Op.B
    lane.num_backward += 1
    return lane.microbatches[lane.num_backward - 1]


def _deliver(lane: _Lane, op: Op, end: float, latency: float) -> list[tuple[int, float]]:
    """Note the arrival of what an action made; returns who is to wake, and when."""
    if op is Op.W:
        return []
    target: _Lane | None
    if op is Op.F:
        target, index = lane.after, lane.num_forward - 1
        if target is None:
            lane.backward_at[index] = end
            return []
    else:
        target, index = lane.before, lane.num_backward - 1
        if target is None:
            return []
    arrival = end + (latency if target.rank != lane.rank else 0.0)
    (target.forward_at if op is Op.F else target.backward_at)[index] = arrival
    return [(target.rank, arrival)]
