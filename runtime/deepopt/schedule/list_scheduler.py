"""An event-driven list scheduler: an idle rank starts the best action that it may start.

It builds the orders that have no closed form. The streams it works on are *lanes*: one stage in
one direction, whose micro-batches pass forward and backward in ascending order, so gradients
are added in micro-batch order by construction. No order can starve: a slot is kept for each lane
with nothing in flight, and room for one backward where backwards need more than forwards keep;
so the deepest micro-batch in flight may always go on. It does not verify (see `verify`) and
knows no particular schedule (see `builders`).

The work is done by `list_codes` on integers, because a search tries hundreds of rules on orders
of a hundred thousand actions.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.compact import CODE_OF_OP, OP_BITS, OP_MASK, OPS, compact_rows
from deepopt.schedule.ir import Action, Direction, Op, Placement
from deepopt.schedule.memory import Memory

Order = tuple[tuple[Action, ...], ...]
"""Actions per rank."""

_F, _I, _B, _W, _R = (CODE_OF_OP[op] for op in (Op.F, Op.I, Op.B, Op.W, Op.R))
_INFINITE = float("inf")


class Prefer(enum.Enum):
    """Which of the lanes whose next action may start goes first."""

    DEEPEST = "the last stages, nearest to the end of a micro-batch's forward"
    EARLIEST = "what has waited longest"
    FEWEST = "the lane that has started the fewest forwards"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRules:
    """What the scheduler may do and what it prefers.

    Args:
        duration: duration(stage, op, rank) in any unit of time; op is F, I, W, B or R. A stage
            whose R takes no time has no R.
        cap: cap(stage, direction): micro-batches in flight in this lane, from the start of F to
            the end of its last gradient; at least 1.
        split: True for I and W apart, W filling the gaps; False for B.
        hop: hop(source, target): from the end of an action to its arrival on another rank; None
            for no time.
        memory: what the ranks can hold; None for no more than the caps of the lanes.
        forward: which lane's F starts; the deepest of equals.
        backward: which lane's I or B starts; the shallowest of equals.
        forward_first: F before I or B.
        weight_backlog: a lane with so many pending W runs one before anything else.
        weight_patience: no W or early R starts when the input of something better arrives within
            this share of its duration.
        prepare_first: an R whose gradient is still to come before a pending W; else after it.
    """

    duration: Callable[[int, Op, int], float]
    cap: Callable[[int, Direction], int]
    split: bool
    hop: Callable[[int, int], float] | None = None
    memory: Memory | None = None
    forward: Prefer = Prefer.DEEPEST
    backward: Prefer = Prefer.EARLIEST
    forward_first: bool = False
    weight_backlog: int | None = None
    weight_patience: float = 0.0
    prepare_first: bool = True


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
        ScheduleError: the memory leaves no slot for each lane of a rank.
    """
    count = len(directions)
    scripts = compact_rows(prefix or (), num_microbatches=count)
    rows, _ = list_codes(placement, directions=directions, rules=rules, prefix=scripts)

    def action(code: int) -> Action:
        stage, microbatch = divmod(code >> OP_BITS, count)
        return Action(stage, OPS[code & OP_MASK], microbatch)

    return tuple(tuple(map(action, row)) for row in rows)


def list_codes(
    placement: Placement,
    *,
    directions: Sequence[Direction],
    rules: ListRules,
    prefix: Sequence[Sequence[int]] = (),
) -> tuple[list[list[int]], float]:
    """As `list_schedule`, in codes (see `compact`).

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        rules: durations, caps and preferences.
        prefix: codes that each rank begins with; empty for none.

    Returns:
        Codes per rank, and when the last action ends.

    Raises:
        ScheduleError: the memory leaves no slot for each lane of a rank.
    """
    # One flat function: attribute look-ups and calls would take most of its time. Everything by
    # lane.
    lanes = _Lanes(placement, directions, rules)
    lanes_of, stage_of, rank_of = lanes.of_rank, lanes.stage, lanes.rank
    microbatches, num_of, cap = lanes.microbatches, lanes.num, lanes.cap
    takes_f, takes_i, takes_w, takes_r = (lanes.duration[op] for op in (_F, _I, _W, _R))
    kept, extra = lanes.kept, lanes.extra
    before, after = lanes.before, lanes.after
    hop_before, hop_after = lanes.hop_before, lanes.hop_after
    forward_at, backward_at = lanes.forward_at, lanes.backward_at
    num_lanes = len(stage_of)
    done_f, done_r, done_i, done_w = ([0] * num_lanes for _ in range(4))

    split, forward_first = rules.split, rules.forward_first
    prefer_forward, prefer_backward = rules.forward, rules.backward
    deepest, earliest, fewest = Prefer.DEEPEST, Prefer.EARLIEST, Prefer.FEWEST
    limit = rules.weight_backlog or 1 << 60
    patience, prepare_first = rules.weight_patience, rules.prepare_first
    room_of, reserve = lanes.room, lanes.reserve
    held_on = [0.0] * placement.num_ranks

    count = len(directions)
    rows: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    scripts = [list(reversed(row)) for row in prefix] or [[] for _ in rows]
    free_at = [0.0] * placement.num_ranks
    wake = [(0.0, rank) for rank in range(placement.num_ranks)]
    push, pop = heapq.heappush, heapq.heappop
    last_end = 0.0
    while wake:
        now, rank = pop(wake)
        if free_at[rank] > now:
            continue
        own = lanes_of[rank]
        lane = -1
        if scripts[rank]:
            lane, op = lanes.follow(
                own, scripts[rank][-1], now, count, (done_f, done_i, done_i, done_w, done_r)
            )
            if lane < 0:
                continue
            scripts[rank].pop()
        else:
            room = room_of[rank]
            if room < _INFINITE:
                room -= held_on[rank]
                for k in own:
                    if done_f[k] == done_w[k] and done_f[k] < num_of[k]:
                        room -= kept[k]
            backward = forward = weight = early = -1
            backward_key = forward_key = next_arrival = early_at = _INFINITE
            backlog = 0
            starved = False
            for k in own:
                started, returned = done_f[k], done_i[k]
                if returned < started:
                    at = backward_at[k][returned]
                    prepared = done_r[k]
                    if at > now:
                        if at < next_arrival:
                            next_arrival = at
                    elif extra[k] and prepared <= returned and extra[k] > room + reserve[rank]:
                        starved = True  # a W has to free memory before
                    else:
                        key = at if prefer_backward is earliest else -stage_of[k]
                        if key < backward_key or (
                            key == backward_key and stage_of[k] < stage_of[backward]
                        ):
                            backward, backward_key = k, key
                    if prepared < started and takes_r[k] and extra[k] <= room:
                        at = backward_at[k][prepared]
                        if early < 0 or at < early_at:
                            early, early_at = k, at
                pending = started - done_w[k]
                if (
                    started < num_of[k]
                    and pending < cap[k]
                    and (kept[k] <= room or not pending)
                ):
                    at = forward_at[k][started]
                    if at > now:
                        if at < next_arrival:
                            next_arrival = at
                    else:
                        if prefer_forward is deepest:
                            key = -stage_of[k]
                        elif prefer_forward is fewest:
                            key = started
                        else:
                            key = at
                        if key < forward_key or (
                            key == forward_key and stage_of[k] > stage_of[forward]
                        ):
                            forward, forward_key = k, key
                pending = returned - done_w[k]
                if pending > backlog:
                    weight, backlog = k, pending
            if weight >= 0 and backlog >= limit:
                lane, op = weight, _W
            elif backward >= 0 and (forward < 0 or not forward_first):
                lane = backward
                op = _R if takes_r[lane] and done_r[lane] <= done_i[lane] else _I
            elif forward >= 0:
                lane, op = forward, _F
            elif early >= 0 and (prepare_first or weight < 0):
                lane, op = early, _R
                if next_arrival - now < patience * takes_r[lane]:
                    continue
            elif weight >= 0:
                lane, op = weight, _W
                if not starved and next_arrival - now < patience * takes_w[lane]:
                    continue
            else:
                continue

        # Start it.
        if op == _F:
            index = done_f[lane]
            done_f[lane] = index + 1
            end = now + takes_f[lane]
            held_on[rank] += kept[lane]
            target = after[lane]
            if target < 0:
                backward_at[lane][index] = end
            else:
                arrival = end + hop_after[lane]
                forward_at[target][index] = arrival
                push(wake, (arrival, rank_of[target]))
        elif op == _I:
            index = done_i[lane]
            done_i[lane] = index + 1
            end = now + takes_i[lane]
            if done_r[lane] <= index:
                done_r[lane] = index + 1
                held_on[rank] += extra[lane]
            if not split:
                end += takes_w[lane]
                done_w[lane] += 1
                held_on[rank] -= kept[lane] + extra[lane]
            target = before[lane]
            if target >= 0:
                arrival = end + hop_before[lane]
                backward_at[target][index] = arrival
                push(wake, (arrival, rank_of[target]))
        elif op == _W:
            index = done_w[lane]
            done_w[lane] = index + 1
            end = now + takes_w[lane]
            held_on[rank] -= kept[lane] + extra[lane]
        else:
            index = done_r[lane]
            done_r[lane] = index + 1
            end = now + takes_r[lane]
            held_on[rank] += extra[lane]
        if op == _I and not split:
            op = _B
        rows[rank].append((stage_of[lane] * count + microbatches[lane][index]) << OP_BITS | op)
        free_at[rank] = end
        if end > last_end:
            last_end = end
        push(wake, (end, rank))
    return rows, last_end


class _Lanes:
    """What is known of each lane before the work starts, as lists by lane."""

    def __init__(
        self, placement: Placement, directions: Sequence[Direction], rules: ListRules
    ) -> None:
        self.of_rank: list[list[int]] = [[] for _ in range(placement.num_ranks)]
        self.stage: list[int] = []
        self.rank: list[int] = []
        self.microbatches: list[tuple[int, ...]] = []
        self.num: list[int] = []
        self.cap: list[int] = []
        self.duration: list[list[float]] = [[] for _ in OPS]
        self.kept: list[float] = []
        self.extra: list[float] = []
        self.before: list[int] = []
        self.after: list[int] = []
        self.hop_before: list[float] = []
        self.hop_after: list[float] = []
        self.forward_at: list[list[float]] = []
        self.backward_at: list[list[float]] = []
        for direction in Direction:
            microbatches = tuple(m for m, d in enumerate(directions) if d is direction)
            if microbatches:
                self._add_stream(placement, direction, microbatches, rules)
        self.reserve = [max((self.extra[k] for k in own), default=0.0) for own in self.of_rank]
        caps = rules.memory.caps if rules.memory else (_INFINITE,) * placement.num_ranks
        self.room = [cap - held for cap, held in zip(caps, self.reserve, strict=True)]
        for rank, own in enumerate(self.of_rank):
            least = sum(self.kept[k] for k in own) + self.reserve[rank]
            if caps[rank] < least:
                raise ScheduleError(
                    f"rank {rank} works on {len(own)} streams of micro-batches, which hold "
                    f"{least:g} with one of each, and may hold {caps[rank]:g}",
                    remedy=f"raise the cap to {least:g}",
                )

    def _add_stream(
        self,
        placement: Placement,
        direction: Direction,
        microbatches: tuple[int, ...],
        rules: ListRules,
    ) -> None:
        last = placement.num_stages - 1

        def hop(source: int, target: int) -> float:
            return 0.0 if rules.hop is None or source == target else rules.hop(source, target)

        for stage in range(placement.num_stages):
            lane = len(self.stage)
            rank = placement.rank_of(stage, direction)
            self.of_rank[rank].append(lane)
            self.stage.append(stage)
            self.rank.append(rank)
            self.microbatches.append(microbatches)
            self.num.append(len(microbatches))
            self.cap.append(max(1, rules.cap(stage, direction)))
            for durations, op in zip(self.duration, OPS, strict=True):
                early = op is Op.R and not rules.split
                durations.append(0.0 if early else rules.duration(stage, op, rank))
            memory = rules.memory
            self.kept.append(memory.kept[stage] if memory else 0.0)
            self.extra.append(memory.full[stage] - memory.kept[stage] if memory else 0.0)
            self.before.append(lane - 1 if stage else -1)
            self.after.append(lane + 1 if stage < last else -1)
            previous = placement.rank_of(stage - 1, direction) if stage else rank
            following = placement.rank_of(stage + 1, direction) if stage < last else rank
            self.hop_before.append(hop(rank, previous))
            self.hop_after.append(hop(rank, following))
            first_input = _INFINITE if stage else 0.0
            self.forward_at.append([first_input] * len(microbatches))
            self.backward_at.append([_INFINITE] * len(microbatches))

    def follow(
        self,
        own: Sequence[int],
        code: int,
        now: float,
        count: int,
        done: tuple[list[int], ...],
    ) -> tuple[int, int]:
        """The lane and op of a fixed action; lane -1 when it may not start yet."""
        op = code & OP_MASK
        stage, microbatch = divmod(code >> OP_BITS, count)
        for lane in own:
            made = done[op][lane]
            if (
                self.stage[lane] == stage
                and made < self.num[lane]
                and self.microbatches[lane][made] == microbatch
            ):
                break
        else:
            raise AssertionError(f"code {code} is not the next of its kind on its rank")
        if op == _F:
            ready = self.forward_at[lane][made] <= now
        elif op in (_I, _B):
            ready = self.backward_at[lane][made] <= now
        else:
            ready = made < done[_F if op == _R else _I][lane]
        return (lane if ready else -1), (_I if op == _B else op)


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
