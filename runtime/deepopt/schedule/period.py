"""How long a step takes where one follows the other, as the executor runs them. Pure.

At the end of a step all ranks wait for each other (the exchange of norms and losses), then each
updates its own stages and begins the next step at once. So updates fill what would be the next step's
warm-up; `simulate` draws one step from its first action on, with the updates at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepopt.schedule.compact import OPS, compact
from deepopt.schedule.event_loop import run
from deepopt.schedule.ir import COMPUTE_OPS, Schedule
from deepopt.schedule.simulate import CostTable, last_gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """One step among others.

    Args:
        step_s: from the end of one exchange to the end of the next.
        exchange_s: of that, from the last rank's arrival at the exchange on.
        busy_s: per rank, compute, messages and updates.
        update_s: per rank, of that, the updates and what follows until the first action.
    """

    step_s: float
    exchange_s: float
    busy_s: tuple[float, ...]
    update_s: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Idle share of the step: 1 - busy / (ranks x step time)."""
        whole = len(self.busy_s) * self.step_s
        return 1 - sum(self.busy_s) / whole if whole > 0 else 0.0


def period(schedule: Schedule, costs: CostTable, *, cores: int | None = None) -> Period:
    """A step that follows another.

    Args:
        schedule: compute actions per rank.
        costs: seconds per op, stage and route.
        cores: as for `simulate`; None where the table says what actions keep the host's cores busy.

    Raises:
        ScheduleError: the schedule deadlocks, or the table is made for other sizes.
    """
    placement = schedule.placement
    stages, ranks = range(placement.num_stages), range(placement.num_ranks)
    zeros = (0.0,) * placement.num_stages
    factors = costs.rank_factor or (1.0,) * placement.num_ranks
    update_s = tuple(
        sum((costs.update_s or zeros)[stage] for stage in placement.stages_of(rank))
        * factors[rank]
        + costs.turn_s
        for rank in ranks
    )
    order = compact(schedule)
    starts, ends = run(
        order,
        duration_s=[[costs.duration_s(stage, op=op) for stage in stages] for op in OPS],
        rank_factor=factors,
        hop_s=lambda source, target: (
            costs.transfer_between(source, target=target),
            costs.latency_between(source, target=target),
        ),
        cores=costs.host_cores if costs.host_s else cores,
        unprepared_s=costs.prepare_s if any(costs.prepare_s) else (),
        message_s=costs.message_s,
        ready_s=update_s,
        host_s=[[costs.host_work_s(stage, op=op) for stage in stages] for op in OPS]
        if costs.host_s
        else (),
        background=costs.background,
    )
    reduce_s = costs.reduce_s or zeros
    last = 0.0
    for rank, times in enumerate(ends):
        last = max(last, times[-1] if times else 0.0)
        held = len(placement.stages_of(rank))
        for stage, whole_s in last_gradients(order, times, rank=rank, num_stages=held):
            last = max(last, whole_s + reduce_s[stage])
    computed = [
        sum(late - early for early, late in zip(starts[rank], ends[rank], strict=True))
        for rank in ranks
    ]
    return Period(
        step_s=last + costs.late_s + costs.agree_s,
        exchange_s=costs.agree_s,
        busy_s=tuple(own + done for own, done in zip(computed, update_s, strict=True)),
        update_s=update_s,
    )


def num_messages(schedule: Schedule) -> tuple[int, ...]:
    """Ends of messages between ranks that each rank has to do with in a step.

    Args:
        schedule: compute actions per rank.
    """
    placement = schedule.placement
    found = [0] * placement.num_ranks
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action.op not in COMPUTE_OPS or action.microbatch is None:
                continue
            direction = schedule.directions[action.microbatch]
            step = {"F": 1, "I": -1, "B": -1}.get(str(action.op), 0)
            user = action.stage + step
            if not step or not 0 <= user < placement.num_stages:
                continue
            target = placement.rank_of(user, direction)
            if target != rank:
                found[rank] += 1
                found[target] += 1
    return tuple(found)
