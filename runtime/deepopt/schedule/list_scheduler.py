"""An event-driven list scheduler: an idle rank starts the best action that it may start.

It builds the orders that have no closed form. The streams it works on are *lanes*: one stage in
one direction, whose micro-batches pass forward and backward in ascending order, so gradients
are added in micro-batch order by construction. No order can starve: where lanes share the memory
of a rank, each has one slot of its own, so the deepest micro-batch in flight may always go on.
It does not verify (see `verify`) and knows no particular schedule
(see `builders`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import Action, Direction, Op, Placement

Order = tuple[tuple[Action, ...], ...]
"""Actions per rank."""


@dataclass(slots=True, kw_only=True)
class Lane:
    """One stage in one direction: its micro-batches and how far each of its ops has come.

    Args:
        stage: global stage index.
        rank: who runs it.
        cap: most micro-batches in flight.
        microbatches: those that pass, ascending.
        forward_at: arrival of the input of each F.
        backward_at: arrival of the gradient of each I or B.
        num_forward: F that were started.
        num_backward: I or B that were started.
        num_weight: W or B that were started.
    """

    stage: int
    rank: int
    cap: int
    microbatches: tuple[int, ...]
    forward_at: list[float]
    backward_at: list[float]
    num_forward: int = 0
    num_backward: int = 0
    num_weight: int = 0
    before: Lane | None = None
    after: Lane | None = None


Key = Callable[[Lane, float], float]
"""Of a lane whose next action may start, and the arrival of its input: the smallest starts."""


def deepest(lane: Lane, arrival: float) -> float:
    """Prefer the last stages, which are nearest to the end of a micro-batch's forward."""
    return -lane.stage


def earliest(lane: Lane, arrival: float) -> float:
    """Prefer what has waited longest."""
    return arrival


def fewest(lane: Lane, arrival: float) -> float:
    """Prefer the lane that has started the fewest forwards."""
    return lane.num_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRules:
    """What the scheduler may do and what it prefers.

    Args:
        duration: duration(stage, op, rank) in any unit of time; op is F, I, W or B.
        cap: cap(stage, direction): micro-batches in flight in this lane, from the start of F to
            the end of its last gradient; at least 1.
        split: True for I and W apart, W filling the gaps; False for B.
        latency: from the end of an action to its arrival on another rank.
        rank_cap: stage micro-batches in flight on one rank, shared by its lanes, one slot kept
            for each; None for no more than the caps of the lanes.
        forward_key: which lane's F starts; the deepest of equals.
        backward_key: which lane's I or B starts; the shallowest of equals.
        forward_first: F before I or B.
        weight_backlog: a lane with so many pending W runs one before anything else.
        weight_patience: no W starts when the input of something better arrives within this share
            of the W's duration.
    """

    duration: Callable[[int, Op, int], float]
    cap: Callable[[int, Direction], int]
    split: bool
    latency: float = 0.0
    rank_cap: int | None = None
    forward_key: Key = deepest
    backward_key: Key = earliest
    forward_first: bool = False
    weight_backlog: int | None = None
    weight_patience: float = 0.0


def list_schedule(
    placement: Placement,
    *,
    directions: Sequence[Direction],
    rules: ListRules,
    prefix: Order | None = None,
) -> Order:
    """Order the work of every rank by always starting the best action that may start.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        rules: durations, caps and preferences.
        prefix: what each rank does first, in this order, before it chooses freely; it must leave
            each lane's micro-batches in ascending order and be free of deadlock.

    Raises:
        ScheduleError: `rank_cap` leaves no slot for each lane of a rank.
    """
    lanes = _lanes(placement, directions, rules)
    most = max(map(len, lanes))
    if rules.rank_cap is not None and rules.rank_cap < most:
        raise ScheduleError(
            f"a rank works on {most} streams of micro-batches and may hold {rules.rank_cap}",
            remedy=f"raise the cap to {most}",
        )
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
        held = lanes[rank]
        choice = _follow(held, now, forced) if forced else _choose(held, now, rules)
        if choice is None:
            continue
        if forced:
            fixed[rank] = next(scripts[rank], None)
        lane, op = choice
        end = now + rules.duration(lane.stage, op, rank)
        actions[rank].append(Action(lane.stage, op, _advance(lane, op)))
        free_at[rank] = end
        heapq.heappush(wake, (end, rank))
        if (woken := _deliver(lane, op, end, rules.latency)) is not None:
            heapq.heappush(wake, woken)
    return tuple(map(tuple, actions))


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
) -> list[list[Lane]]:
    by_rank: list[list[Lane]] = [[] for _ in range(placement.num_ranks)]
    for direction in Direction:
        microbatches = tuple(m for m, d in enumerate(directions) if d is direction)
        previous: Lane | None = None
        for stage in range(placement.num_stages if microbatches else 0):
            first_input = 0.0 if previous is None else float("inf")
            lane = Lane(
                stage=stage,
                rank=placement.rank_of(stage, direction),
                cap=max(1, rules.cap(stage, direction)),
                microbatches=microbatches,
                forward_at=[first_input] * len(microbatches),
                backward_at=[float("inf")] * len(microbatches),
                before=previous,
            )
            if previous is not None:
                previous.after = lane
            by_rank[lane.rank].append(lane)
            previous = lane
    return by_rank


def _choose(lanes: Sequence[Lane], now: float, rules: ListRules) -> tuple[Lane, Op] | None:
    backward: Lane | None = None
    forward: Lane | None = None
    weight: Lane | None = None
    best_backward = best_forward = (float("inf"), 0)
    backlog = 0
    next_arrival = float("inf")
    free_slots = _free_slots(lanes, rules.rank_cap)
    for lane in lanes:
        in_flight = lane.num_forward - lane.num_weight
        if lane.num_backward < lane.num_forward:
            arrival = lane.backward_at[lane.num_backward]
            if arrival > now:
                next_arrival = min(next_arrival, arrival)
            elif (key := (rules.backward_key(lane, arrival), lane.stage)) < best_backward:
                backward, best_backward = lane, key
        if (
            lane.num_forward < len(lane.microbatches)
            and in_flight < lane.cap
            and (free_slots > 0 or not in_flight)
        ):
            arrival = lane.forward_at[lane.num_forward]
            if arrival > now:
                next_arrival = min(next_arrival, arrival)
            elif (key := (rules.forward_key(lane, arrival), -lane.stage)) < best_forward:
                forward, best_forward = lane, key
        pending = lane.num_backward - lane.num_weight
        if pending > backlog:
            weight, backlog = lane, pending
    limit = rules.weight_backlog
    if weight is not None and limit is not None and backlog >= limit:
        return weight, Op.W
    if backward is not None and (forward is None or not rules.forward_first):
        return backward, Op.I if rules.split else Op.B
    if forward is not None:
        return forward, Op.F
    if weight is None:
        return None
    patience = rules.weight_patience * rules.duration(weight.stage, Op.W, weight.rank)
    return None if next_arrival - now < patience else (weight, Op.W)


def _free_slots(lanes: Sequence[Lane], rank_cap: int | None) -> float:
    """What the cap of a rank leaves when one slot is kept for each lane with none in flight."""
    if rank_cap is None:
        return float("inf")
    taken = 0
    for lane in lanes:
        in_flight = lane.num_forward - lane.num_weight
        taken += in_flight or lane.num_forward < len(lane.microbatches)
    return rank_cap - taken


def _follow(lanes: Sequence[Lane], now: float, action: Action) -> tuple[Lane, Op] | None:
    """The lane of a fixed action when it may start now."""
    for lane in lanes:
        made = {Op.F: lane.num_forward, Op.W: lane.num_weight}.get(action.op, lane.num_backward)
        if (
            lane.stage == action.stage
            and made < len(lane.microbatches)
            and lane.microbatches[made] == action.microbatch
        ):
            break
    else:
        raise AssertionError(f"{action} is not the next of its kind on the rank of its order")
    if action.op is Op.F:
        at = lane.forward_at[made]
    elif action.op is Op.W:
        at = 0.0 if made < lane.num_backward else float("inf")
    else:
        at = lane.backward_at[made]
    return (lane, action.op) if at <= now else None


def _advance(lane: Lane, op: Op) -> int:
    if op is Op.F:
        lane.num_forward += 1
        return lane.microbatches[lane.num_forward - 1]
    if op is Op.W:
        lane.num_weight += 1
        return lane.microbatches[lane.num_weight - 1]
    lane.num_weight += op is Op.B
    lane.num_backward += 1
    return lane.microbatches[lane.num_backward - 1]


def _deliver(lane: Lane, op: Op, end: float, latency: float) -> tuple[float, int] | None:
    """Note the arrival of what an action made; returns when to wake whom, if anyone."""
    if op is Op.W:
        return None
    index = (lane.num_forward if op is Op.F else lane.num_backward) - 1
    target = lane.after if op is Op.F else lane.before
    if target is None:
        if op is Op.F:
            lane.backward_at[index] = end
        return None
    arrival = end + (latency if target.rank != lane.rank else 0.0)
    (target.forward_at if op is Op.F else target.backward_at)[index] = arrival
    return arrival, target.rank
