"""What a schedule costs: from times per op to a timeline, the step time and the bubble.

An event simulation, deterministic and pure. Ranks follow their order; an action starts when its
rank is free and its input has arrived. Sends do not block compute: a tensor waits for its
route, occupies it for the transfer time, and arrives one latency later. It does not check the
schedule (see `verify`) and does not choose one (see `search`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import COMPUTE_OPS, Action, Direction, Op, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds that each op takes; B takes I and W together.

    Args:
        forward_s: F of each stage.
        input_s: I of each stage.
        weight_s: W of each stage.
        prepare_s: R of each stage; empty for zero.
        rank_factor: multiplies all compute of a rank, for slow devices; empty for 1.
        latency_s: from the end of a transfer to its arrival on another rank.
        transfer_s: how long one tensor occupies its route (source, target, kind).
        host_of: the host of each rank, any integers; empty where all routes are alike.
        inter_host_latency_s: latency_s between ranks of different hosts.
        inter_host_transfer_s: transfer_s between ranks of different hosts.
        reduce_s: exchange of each stage's gradients between its copies and replicas, after the
            last of them is whole; it occupies no rank. Empty for zero.
        update_s: optimizer update of each stage, on every rank that holds it, after the rank's
            last action and the stage's exchange. Empty for zero.
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    prepare_s: tuple[float, ...] = ()
    rank_factor: tuple[float, ...] = ()
    latency_s: float = 0.0
    transfer_s: float = 0.0
    host_of: tuple[int, ...] = ()
    inter_host_latency_s: float = 0.0
    inter_host_transfer_s: float = 0.0
    reduce_s: tuple[float, ...] = ()
    update_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        num_stages = len(self.forward_s)
        for name in ("input_s", "weight_s", "prepare_s", "reduce_s", "update_s"):
            times: tuple[float, ...] = getattr(self, name)
            may_be_empty = name not in ("input_s", "weight_s")
            if len(times) != num_stages and (times or not may_be_empty):
                raise ScheduleError(
                    f"the cost table has {num_stages} stages in forward_s, "
                    f"{len(times)} in {name}"
                )
        everything = (
            *self.forward_s,
            *self.input_s,
            *self.weight_s,
            *self.prepare_s,
            *self.rank_factor,
            self.latency_s,
            self.transfer_s,
            self.inter_host_latency_s,
            self.inter_host_transfer_s,
            *self.reduce_s,
            *self.update_s,
        )
        if any(not 0 <= time < float("inf") for time in everything):
            raise ScheduleError("the cost table holds a time that is negative or not finite")
        if not self.host_of and (self.inter_host_latency_s or self.inter_host_transfer_s):
            raise ScheduleError(
                f"the cost table prices routes between hosts ({self.inter_host_latency_s} s, "
                f"{self.inter_host_transfer_s} s) and does not say where the ranks are",
                remedy="give host_of, one host for each rank",
            )

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        *,
        forward_s: float,
        input_s: float,
        weight_s: float,
        latency_s: float = 0.0,
        transfer_s: float = 0.0,
    ) -> CostTable:
        """The same times for all stages.

        Args:
            num_stages: number of stages.
            forward_s: F of a stage.
            input_s: I of a stage.
            weight_s: W of a stage.
            latency_s: as for the class.
            transfer_s: as for the class.
        """
        return cls(
            forward_s=(forward_s,) * num_stages,
            input_s=(input_s,) * num_stages,
            weight_s=(weight_s,) * num_stages,
            latency_s=latency_s,
            transfer_s=transfer_s,
        )

    def duration_s(self, stage: int, *, op: Op) -> float:
        """How long a compute action takes on a rank of factor 1.

        Args:
            stage: global stage index.
            op: F, I, W, B or R.
        """
        if op is Op.F:
            return self.forward_s[stage]
        if op is Op.I:
            return self.input_s[stage]
        if op is Op.W:
            return self.weight_s[stage]
        if op is Op.B:
            return self.input_s[stage] + self.weight_s[stage]
        assert op is Op.R, f"{op} takes no compute time"
        return self.prepare_s[stage] if self.prepare_s else 0.0

    def latency_between(self, source: int, *, target: int) -> float:
        """From the end of a transfer to its arrival: 0 on one rank.

        Args:
            source: the rank that made the tensor.
            target: the rank that uses it.
        """
        if source == target:
            return 0.0
        return self.inter_host_latency_s if self._apart(source, target) else self.latency_s

    def transfer_between(self, source: int, *, target: int) -> float:
        """How long one tensor occupies the route between two ranks: 0 on one rank.

        Args:
            source: the rank that made the tensor.
            target: the rank that uses it.
        """
        if source == target:
            return 0.0
        return self.inter_host_transfer_s if self._apart(source, target) else self.transfer_s

    def hop_between(self, source: int, *, target: int) -> float:
        """From the end of an action to its arrival over an idle route.

        Args:
            source: the rank that made the tensor.
            target: the rank that uses it.
        """
        return self.transfer_between(source, target=target) + self.latency_between(
            source, target=target
        )

    def _apart(self, source: int, target: int) -> bool:
        return bool(self.host_of) and self.host_of[source] != self.host_of[target]


class Span(NamedTuple):
    """An action at its time. With `REDUCE`, the update of the stage after the exchange.

    Args:
        action: what.
        start_s: since the start of the step.
        end_s: since the start of the step.
    """

    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A schedule in time.

    Args:
        schedule: what was simulated.
        spans: per rank, in order.
        busy_s: per rank, the sum of its spans.
        makespan_s: from the start of the step to the end of the last span.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    busy_s: tuple[float, ...]
    makespan_s: float

    @property
    def bubble(self) -> float:
        """Idle share of the step: 1 - busy / (ranks x step time)."""
        if self.makespan_s <= 0:
            return 0.0
        return 1 - sum(self.busy_s) / (len(self.busy_s) * self.makespan_s)


def simulate(schedule: Schedule, costs: CostTable, *, cores: int | None = None) -> Timeline:
    """Run a schedule against a cost table.

    Args:
        schedule: compute actions per rank.
        costs: seconds per op, stage and route.
        cores: host cores that the ranks share: at most so many compute at once, the one that
            was ready first goes first. None where each rank has a device of its own.

    Raises:
        ScheduleError: the schedule deadlocks, or the table is made for other sizes.
    """
    _check_sizes(schedule, costs, cores)
    starts, ends = _run(schedule, costs, cores)
    updates = _updates(schedule, costs, ends)
    spans = tuple(
        (*map(Span, row, starts[rank], ends[rank]), *updates[rank])
        for rank, row in enumerate(schedule.actions)
    )
    return Timeline(
        schedule=schedule,
        spans=spans,
        busy_s=tuple(sum(span.end_s - span.start_s for span in row) for row in spans),
        makespan_s=max((row[-1].end_s for row in spans if row), default=0.0),
    )


def _check_sizes(schedule: Schedule, costs: CostTable, cores: int | None) -> None:
    placement = schedule.placement
    if len(costs.forward_s) != placement.num_stages:
        raise ScheduleError(
            f"the cost table has {len(costs.forward_s)} stages, the schedule "
            f"{placement.num_stages}"
        )
    for per_rank, what in (
        (costs.rank_factor, "rank factors"),
        (costs.host_of, "hosts of ranks"),
    ):
        if len(per_rank) not in (0, placement.num_ranks):
            raise ScheduleError(
                f"the cost table has {len(per_rank)} {what}, the schedule "
                f"{placement.num_ranks} ranks"
            )
    if cores is not None and cores < 1:
        raise ScheduleError(
            f"ranks cannot share {cores} cores", remedy="give at least one core"
        )


def _run(
    schedule: Schedule, costs: CostTable, cores: int | None
) -> tuple[list[list[float]], list[list[float]]]:
    """Start and end of every action. One flat loop, because p = 1024 means millions of actions.

    A rank goes on until its next input is not known yet; then it waits for the maker to wake it.
    With shared cores, ranks take turns in the order in which their next actions are ready.
    """
    placement = schedule.placement
    rows, num_microbatches = schedule.actions, schedule.num_microbatches
    last_stage = placement.num_stages - 1
    rank_of = [
        placement.down if direction is Direction.DOWN or placement.up is None else placement.up
        for direction in schedule.directions
    ]
    duration = {
        op: [costs.duration_s(stage, op=op) for stage in range(placement.num_stages)]
        for op in COMPUTE_OPS
    }
    factor = costs.rank_factor or (1.0,) * placement.num_ranks
    # By 2 * (stage * num_microbatches + microbatch), + 1 for what a forward makes.
    num_tensors = 2 * placement.num_stages * num_microbatches
    arrival: list[float | None] = [None] * num_tensors
    waiting: list[int | None] = [None] * num_tensors
    route_free: dict[tuple[int, int, bool], float] = {}
    at = [0] * placement.num_ranks
    free_at = [0.0] * placement.num_ranks
    starts: list[list[float]] = [[] for _ in rows]
    ends: list[list[float]] = [[] for _ in rows]
    core_free = [0.0] * (cores or 0)
    todo = [(0.0, rank) for rank in range(placement.num_ranks)]
    while todo:
        turn, rank = todo.pop() if cores is None else heapq.heappop(todo)
        row, index, free = rows[rank], at[rank], free_at[rank]
        while index < len(row):
            action = row[index]
            stage, op = action.stage, action.op
            microbatch: int = action.microbatch  # type: ignore[assignment]
            start = free
            backward = op is Op.I or op is Op.B
            needs = -1
            if op is Op.F:
                if stage:
                    needs = 2 * ((stage - 1) * num_microbatches + microbatch) + 1
            elif backward and stage < last_stage:
                needs = 2 * ((stage + 1) * num_microbatches + microbatch)
            if needs >= 0:
                arrived = arrival[needs]
                if arrived is None:
                    waiting[needs] = rank
                    break
                start = max(free, arrived)
            if cores is not None:
                if start > turn:
                    heapq.heappush(todo, (start, rank))
                    break
                turn = -1.0  # one action a turn
                start = max(start, heapq.heappop(core_free))
            free = start + duration[op][stage] * factor[rank]
            if cores is not None:
                heapq.heappush(core_free, free)
            starts[rank].append(start)
            ends[rank].append(free)
            index += 1
            if op is Op.F:
                user = stage + 1
            elif backward:
                user = stage - 1
            else:
                continue
            if 0 <= user <= last_stage:
                arrived = free
                target = rank_of[microbatch][user]
                if target != rank:
                    transfer_s = costs.transfer_between(rank, target=target)
                    if transfer_s:
                        route = (rank, target, backward)
                        arrived = max(free, route_free.get(route, 0.0)) + transfer_s
                        route_free[route] = arrived
                    arrived += costs.latency_between(rank, target=target)
                made = 2 * (stage * num_microbatches + microbatch) + (op is Op.F)
                arrival[made] = arrived
                woken = waiting[made]
                if woken is not None:
                    todo_entry = (max(free_at[woken], arrived), woken)
                    if cores is None:
                        todo.append(todo_entry)
                    else:
                        heapq.heappush(todo, todo_entry)
        at[rank], free_at[rank] = index, free
    for rank, row in enumerate(rows):
        if at[rank] < len(row):
            raise ScheduleError(
                f"schedule {schedule.name} stands still: rank {rank} waits for ever "
                f"before {row[at[rank]]}",
                remedy="verify the schedule to see why",
            )
    return starts, ends


def _updates(
    schedule: Schedule, costs: CostTable, ends: Sequence[Sequence[float]]
) -> list[list[Span]]:
    """The exchange and the update of each stage, per rank, if the table has either."""
    placement = schedule.placement
    updates: list[list[Span]] = [[] for _ in ends]
    if not costs.reduce_s and not costs.update_s:
        return updates
    zeros = (0.0,) * placement.num_stages
    reduce_s, update_s = costs.reduce_s or zeros, costs.update_s or zeros
    whole_at = list(zeros)
    for row, times in zip(schedule.actions, ends, strict=True):
        for action, end in zip(row, times, strict=True):
            if action.op in (Op.W, Op.B):
                whole_at[action.stage] = max(whole_at[action.stage], end)
    for rank, times in enumerate(ends):
        factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
        free = times[-1] if times else 0.0
        stages = placement.stages_of(rank)
        for summed_at, stage in sorted((whole_at[s] + reduce_s[s], s) for s in stages):
            start = max(free, summed_at)
            free = start + update_s[stage] * factor
            updates[rank].append(Span(Action(stage, Op.REDUCE), start, free))
    return updates
