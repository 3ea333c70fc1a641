"""What a schedule costs: from times per op to a timeline, the step time and the bubble.

An event simulation, deterministic and pure. Ranks follow their order; an action starts when its
rank is free and its input has arrived. Sends do not block compute: a tensor waits for its
route, occupies it for the transfer time, and arrives one latency later. The loop itself is in
`event_loop`. It does not check the schedule (see `verify`) and does not choose one (see `search`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import sub
from typing import NamedTuple

from deepopt.errors import ScheduleError
from deepopt.schedule.compact import OP_BITS, OP_MASK, OPS, CompactSchedule, compact
from deepopt.schedule.event_loop import Times, run
from deepopt.schedule.ir import Action, Op, Placement, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds that each op takes; B takes I and W together.

    Args:
        forward_s: F of each stage.
        input_s: I of each stage.
        weight_s: W of each stage.
        prepare_s: R of each stage; empty for zero. A micro-batch without an R of its own pays it
            in its I or B.
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
        message_s: what each end of a message between ranks takes of its rank, and of a core: its
            sender after the action, its receiver with the next one.
        late_s: sums that begin when those of all stages are over: routers' counts (`period`).
        agree_s: the exchange of all ranks at the end of a step, before any update (`period`).
        turn_s: what each rank does between the update and its next first action.
        host_s: F, I and W of each stage: how long each keeps a core of the host busy, where that is less than
            it lasts, as on emulated devices; empty where it is none's affair (`period`).
        host_cores: cores of that host; None where `host_s` is empty.
        background: cores that other work takes, on average, of those that ranks share.
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
    message_s: float = 0.0
    late_s: float = 0.0
    agree_s: float = 0.0
    turn_s: float = 0.0
    host_s: tuple[tuple[float, ...], ...] = ()
    host_cores: int | None = None
    background: float = 0.0

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
            self.message_s,
            self.late_s,
            self.agree_s,
            self.turn_s,
            self.background,
        )
        if any(not 0 <= time < float("inf") for time in everything):
            raise ScheduleError("the cost table holds a figure that is negative or not finite")
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

    def host_work_s(self, stage: int, *, op: Op) -> float:
        """How long a compute action keeps a core of the host busy.

        Args:
            stage: global stage index.
            op: F, I, W, B or R.
        """
        forward_s, input_s, weight_s = (own[stage] for own in self.host_s)
        if op is Op.B:
            return input_s + weight_s
        return {Op.F: forward_s, Op.R: forward_s, Op.I: input_s, Op.W: weight_s}[op]

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
        return _bubble(self.busy_s, self.makespan_s)

    @property
    def steady_s(self) -> float:
        """Step time where each rank begins the next step as soon as it has ended this one.

        Then all ranks repeat their spans at one distance, which must hold the longest of them.
        """
        return max((row[-1].end_s - row[0].start_s for row in self.spans if row), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactTimeline:
    """A compact schedule in time.

    Args:
        schedule: what was simulated.
        starts: per rank, seconds since the start of the step for each action.
        ends: as `starts`.
        updates: per rank, the updates that follow its actions; empty where the table has none.
        busy_s: per rank, the sum of its actions and updates.
        makespan_s: from the start of the step to the end of the last action or update.
    """

    schedule: CompactSchedule
    starts: tuple[Times, ...]
    ends: tuple[Times, ...]
    updates: tuple[tuple[Span, ...], ...]
    busy_s: tuple[float, ...]
    makespan_s: float

    @property
    def bubble(self) -> float:
        """Idle share of the step: 1 - busy / (ranks x step time)."""
        return _bubble(self.busy_s, self.makespan_s)

    @property
    def steady_s(self) -> float:
        """As for `Timeline`."""
        return max(
            (
                (updates[-1].end_s if updates else ends[-1]) - starts[0]
                for starts, ends, updates in zip(
                    self.starts, self.ends, self.updates, strict=True
                )
                if starts
            ),
            default=0.0,
        )


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
    timed = simulate_compact(compact(schedule), costs, cores=cores)
    return Timeline(
        schedule=schedule,
        spans=tuple(
            (*map(Span, row, starts, ends), *updates)
            for row, starts, ends, updates in zip(
                schedule.actions, timed.starts, timed.ends, timed.updates, strict=True
            )
        ),
        busy_s=timed.busy_s,
        makespan_s=timed.makespan_s,
    )


def simulate_compact(
    schedule: CompactSchedule, costs: CostTable, *, cores: int | None = None
) -> CompactTimeline:
    """As `simulate`, in 20 bytes an action: for orders of millions.

    Args:
        schedule: codes per rank.
        costs: seconds per op, stage and route.
        cores: as for `simulate`.

    Raises:
        ScheduleError: the schedule deadlocks, or the table is made for other sizes.
    """
    placement = schedule.placement
    _check_sizes(placement, costs, cores)
    stages = range(placement.num_stages)
    starts, ends = run(
        schedule,
        duration_s=[[costs.duration_s(stage, op=op) for stage in stages] for op in OPS],
        rank_factor=costs.rank_factor or (1.0,) * placement.num_ranks,
        hop_s=lambda source, target: (
            costs.transfer_between(source, target=target),
            costs.latency_between(source, target=target),
        ),
        cores=cores,
        unprepared_s=costs.prepare_s if any(costs.prepare_s) else (),
        message_s=costs.message_s,
        background=costs.background,
    )
    updates = _updates(schedule, costs, ends)
    lasts = [
        updated[-1].end_s if updated else times[-1]
        for updated, times in zip(updates, ends, strict=True)
        if updated or times
    ]
    return CompactTimeline(
        schedule=schedule,
        starts=starts,
        ends=ends,
        updates=updates,
        busy_s=tuple(
            sum([*map(sub, late, early), *(span.end_s - span.start_s for span in updated)])
            for early, late, updated in zip(starts, ends, updates, strict=True)
        ),
        makespan_s=max(lasts, default=0.0),
    )


def _bubble(busy_s: Sequence[float], makespan_s: float) -> float:
    return 1 - sum(busy_s) / (len(busy_s) * makespan_s) if makespan_s > 0 else 0.0


def _check_sizes(placement: Placement, costs: CostTable, cores: int | None) -> None:
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


def _updates(
    schedule: CompactSchedule, costs: CostTable, ends: Sequence[Times]
) -> tuple[tuple[Span, ...], ...]:
    """The exchange and the update of each stage, per rank, if the table has either."""
    placement = schedule.placement
    if not costs.reduce_s and not costs.update_s:
        return ((),) * placement.num_ranks
    zeros = (0.0,) * placement.num_stages
    reduce_s, update_s = costs.reduce_s or zeros, costs.update_s or zeros
    held: list[list[int]] = [[] for _ in range(placement.num_ranks)]
    for stage in range(placement.num_stages):
        for rank in placement.copies_of(stage):
            held[rank].append(stage)
    whole_at = list(zeros)
    for rank, times in enumerate(ends):
        for stage, end in last_gradients(
            schedule, times, rank=rank, num_stages=len(held[rank])
        ):
            whole_at[stage] = max(whole_at[stage], end)
    updates: list[tuple[Span, ...]] = []
    for rank, times in enumerate(ends):
        factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
        free = times[-1] if times else 0.0
        spans = []
        for summed_at, stage in sorted((whole_at[s] + reduce_s[s], s) for s in held[rank]):
            start = max(free, summed_at)
            free = start + update_s[stage] * factor
            spans.append(Span(Action(stage, Op.REDUCE), start, free))
        updates.append(tuple(spans))
    return tuple(updates)


def last_gradients(
    schedule: CompactSchedule, times: Times, *, rank: int, num_stages: int
) -> Iterable[tuple[int, float]]:
    """Each stage of a rank with the end of its last W or B; from the back, because ends ascend.

    Args:
        schedule: codes per rank.
        times: ends of the rank's actions.
        rank: which.
        num_stages: that it holds.
    """
    row, count = schedule.rows[rank], schedule.num_microbatches
    seen: set[int] = set()
    for index in range(len(row) - 1, -1, -1):
        stage = (row[index] >> OP_BITS) // count
        if OPS[row[index] & OP_MASK] in (Op.W, Op.B) and stage not in seen:
            seen.add(stage)
            yield stage, times[index]
            if len(seen) == num_stages:
                return
