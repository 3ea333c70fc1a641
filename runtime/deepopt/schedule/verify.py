"""Is a schedule right? Refuses a wrong one, naming the first bad action and the rule it breaks.

Checked: every micro-batch does each of its ops once and on the right rank; F before R before I
    or B before W; a stage's F after the F of the stage before, its I or B after that of the
    stage after; gradients of a stage in ascending micro-batch order in each direction (groups
    are contiguous and have one direction, so they are added in order inside every group); no
    deadlock, also with one send under way per channel (`verify_lowered`); a cap on activations.
    Not checked: time (`simulate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.faults import Fault, fault_at, find_membership_fault
from deepopt.schedule.ir import Action, Op, Schedule
from deepopt.schedule.lowering import count_transfers, lower
from deepopt.schedule.memory import Memory, held_at
from deepopt.schedule.verify_lowered import find_transfer_fault

_GRADIENT_ORDER = "the gradients of a stage are added in micro-batch order"
_GRADIENT_REMEDY = (
    "put them in ascending order: then the numbers do not depend on the schedule, bit for bit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What a right schedule needs.

    Args:
        peak_activations: per rank, the most stage micro-batches in flight: from the start of F
            to the end of B or W.
        num_transfers: tensors sent between ranks in one step.
    """

    peak_activations: tuple[int, ...]
    num_transfers: int


def verify(
    schedule: Schedule, *, memory_cap: int | None = None, memory: Memory | None = None
) -> VerifyReport:
    """Refuse a wrong schedule.

    Args:
        schedule: compute actions per rank.
        memory_cap: most stage micro-batches in flight that a rank can hold; None for no cap.
        memory: instead of `memory_cap`: sizes by stage and capacities by rank.

    Raises:
        ScheduleError: names the first bad action and the rule it breaks.
    """
    fault = find_fault(schedule, memory_cap=memory_cap, memory=memory)
    if fault is not None:
        raise ScheduleError(fault.message, remedy=fault.remedy)
    return VerifyReport(
        peak_activations=peak_activations(schedule),
        num_transfers=count_transfers(schedule),
    )


def find_fault(
    schedule: Schedule, *, memory_cap: int | None = None, memory: Memory | None = None
) -> Fault | None:
    """The first fault of a schedule, for those who want to draw it; None when it is right.

    Args:
        schedule: compute actions per rank.
        memory_cap: as for `verify`.
        memory: as for `verify`.
    """
    fault = find_membership_fault(schedule) or _local_order(schedule) or _progress(schedule)
    if fault is not None:
        return fault
    rows = lower(schedule, reduce=True)
    if (transfer := find_transfer_fault(schedule, rows=rows, buffers=1)) is not None:
        return Fault(rank=transfer.rank, action=transfer.action, message=transfer.message)
    if memory_cap is not None:
        return _memory(schedule, memory_cap)
    return None if memory is None else _sizes(schedule, memory)


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most stage micro-batches in flight at once.

    Args:
        schedule: compute actions per rank.
    """
    peaks = []
    for row in schedule.actions:
        held = peak = 0
        for action in row:
            if action.op is Op.F:
                held += 1
                peak = max(peak, held)
            elif action.op in (Op.B, Op.W):
                held -= 1
        peaks.append(peak)
    return tuple(peaks)


def _needs(schedule: Schedule, action: Action) -> list[Action]:
    """The actions whose results an action uses; a backward by its I, which stands for B too."""
    stage, microbatch = action.stage, action.microbatch
    if action.op is Op.F:
        return [Action(stage - 1, Op.F, microbatch)] if stage else []
    if action.op is Op.W:
        return [Action(stage, Op.I, microbatch)]
    needs = [Action(stage, Op.F, microbatch)]
    if action.op is not Op.R and stage < schedule.placement.num_stages - 1:
        needs.append(Action(stage + 1, Op.I, microbatch))
    return needs


def _result(action: Action) -> Action:
    """What others need an action for: B gives what I gives."""
    return Action(action.stage, Op.I, action.microbatch) if action.op is Op.B else action


def _local_order(schedule: Schedule) -> Fault | None:
    """Dependencies inside a rank, and gradients in order."""
    for rank, row in enumerate(schedule.actions):
        position = {_result(action): index for index, action in enumerate(row)}
        last: dict[tuple[int, str, Op], Action] = {}
        for index, action in enumerate(row):
            for need in _needs(schedule, action):
                if position.get(need, -1) > index:
                    late = row[position[need]]
                    return fault_at(
                        rank,
                        action,
                        f"runs before {late}, whose result it needs",
                        related=(late,),
                    )
            if action.op in (Op.I, Op.B):
                ready = Action(action.stage, Op.R, action.microbatch)
                if position.get(ready, -1) > index:
                    return fault_at(
                        rank,
                        ready,
                        f"runs after {action}, which it is to prepare",
                        related=(action,),
                    )
            assert action.microbatch is not None, f"{action} passed without a micro-batch"
            direction = schedule.directions[action.microbatch]
            for part in (Op.I, Op.W) if action.op is Op.B else (action.op,):
                if part not in (Op.I, Op.W):
                    continue
                before = last.get((action.stage, direction, part))
                if before is not None and (before.microbatch or 0) > action.microbatch:
                    return fault_at(
                        rank,
                        before,
                        f"runs before {action}, but {_GRADIENT_ORDER}",
                        related=(action,),
                        remedy=_GRADIENT_REMEDY,
                    )
                last[action.stage, direction, part] = action
    return None


def _progress(schedule: Schedule) -> Fault | None:
    """Run the rows against each other with no regard to time; report who waits for whom."""
    rows = schedule.actions
    at = [0] * len(rows)
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    runnable = list(range(len(rows)))
    while runnable:
        rank = runnable.pop()
        row = rows[rank]
        while at[rank] < len(row):
            action = row[at[rank]]
            missing = next((n for n in _needs(schedule, action) if n not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            result = _result(action)
            done.add(result)
            at[rank] += 1
            runnable += waiting.pop(result, ())
    stuck = [rank for rank, row in enumerate(rows) if at[rank] < len(row)]
    return _cycle(schedule, at, done, stuck[0]) if stuck else None


def _cycle(schedule: Schedule, at: Sequence[int], done: set[Action], first: int) -> Fault:
    """Follow who waits for whom from a stuck rank until a rank comes again."""
    order: list[int] = []
    waits: dict[int, str] = {}
    awaited: dict[int, Action] = {}
    rank = first
    while rank not in waits:
        action = schedule.actions[rank][at[rank]]
        need = next(n for n in _needs(schedule, action) if n not in done)
        other = schedule.rank_of(need)
        name = next(a for a in schedule.actions[other] if _result(a) == need)
        waits[rank] = f"{action} on rank {rank} waits for {name} on rank {other}"
        awaited[rank] = name
        order.append(rank)
        rank = other
    circle = order[order.index(rank) :]
    action = schedule.actions[circle[0]][at[circle[0]]]
    return Fault(
        rank=circle[0],
        action=action,
        message="deadlock: " + ", ".join(waits[r] for r in circle),
        remedy="each of these actions stands before what another of them needs: move one later",
        related=tuple(
            dict.fromkeys(
                one for r in circle for one in (schedule.actions[r][at[r]], awaited[r])
            )
        ),
    )


def _memory(schedule: Schedule, memory_cap: int) -> Fault | None:
    for rank, row in enumerate(schedule.actions):
        held: dict[tuple[int, int | None], Action] = {}
        for action in row:
            if action.op is Op.F:
                held[action.stage, action.microbatch] = action
            elif action.op in (Op.B, Op.W):
                held.pop((action.stage, action.microbatch), None)
            if len(held) > memory_cap:
                others = tuple(other for other in held.values() if other != action)
                return fault_at(
                    rank,
                    action,
                    f"would hold activations of {len(held)} stage micro-batches, the cap is "
                    f"{memory_cap}",
                    related=others,
                    remedy="raise the cap or choose a schedule with fewer in flight",
                )
    return None


def _sizes(schedule: Schedule, memory: Memory) -> Fault | None:
    """The first action that asks a rank for more than it can hold."""
    for rank, (row, cap) in enumerate(zip(schedule.actions, memory.caps, strict=True)):
        for action, held in zip(row, held_at(row, memory), strict=True):
            if held > cap * (1 + 1e-9):
                return Fault(
                    rank=rank,
                    action=action,
                    message=f"rank {rank}: {action} would hold activations of {held:,.0f}, the "
                    f"rank has room for {cap:,.0f}",
                    remedy="use smaller micro-batches, more ranks, or a schedule with fewer "
                    "in flight",
                )
    return None
