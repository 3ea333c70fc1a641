"""What is wrong with a schedule, as data; and whether every action is there, once, where it belongs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import COMPUTE_OPS, Action, Op, Schedule

_SLIP = 2  # so few actions of a micro-batch are taken for a wrong number


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The first thing that is wrong.

    Args:
        rank: where.
        action: the bad action; when it is missing, the one that should be there.
        message: action and reason, in one sentence.
        remedy: what to do, if there is more to say than "change the order".
        related: the other actions that the message is about.
        is_missing: the action should be there and is not.
    """

    rank: int
    action: Action
    message: str
    remedy: str = ""
    related: tuple[Action, ...] = ()
    is_missing: bool = False


def fault_at(
    rank: int,
    action: Action,
    problem: str,
    *,
    related: tuple[Action, ...] = (),
    remedy: str = "",
) -> Fault:
    """A fault that is said as `rank R: ACTION PROBLEM`.

    Args:
        rank: where.
        action: the bad action.
        problem: what is wrong with it.
        related: as for `Fault`.
        remedy: as for `Fault`.
    """
    message = f"rank {rank}: {action} {problem}"
    return Fault(rank=rank, action=action, message=message, remedy=remedy, related=related)


def find_membership_fault(schedule: Schedule) -> Fault | None:
    """The first action that is missing, out of place, or there twice; None when all are right.

    Args:
        schedule: compute actions per rank.

    Raises:
        ScheduleError: the schedule has other ranks than its placement.
    """
    placement = schedule.placement
    if len(schedule.actions) != placement.num_ranks:
        raise ScheduleError(
            f"the schedule has orders for {len(schedule.actions)} ranks, its placement has "
            f"{placement.num_ranks}"
        )
    seen: set[Action] = set()
    for rank, row in enumerate(schedule.actions):
        for action in row:
            problem = ""
            if action.op not in COMPUTE_OPS:
                problem = "is not a compute action; sends and receives are added by lowering"
            elif not 0 <= action.stage < placement.num_stages:
                problem = f"names a stage that is not one of 0 to {placement.num_stages - 1}"
            elif (
                action.microbatch is None
                or not 0 <= action.microbatch < schedule.num_microbatches
            ):
                problem = f"names a micro-batch that is not one of 0 to {schedule.num_microbatches - 1}"
            elif (owner := schedule.rank_of(action)) != rank:
                problem = (
                    f"belongs to rank {owner}: that is where placement {placement.kind} has "
                    f"stage {action.stage} for micro-batch {action.microbatch}"
                )
            elif action in seen:
                problem = "runs twice"
            if problem:
                return fault_at(rank, action, problem)
            seen.add(action)
    for stage in range(placement.num_stages):
        for microbatch, direction in enumerate(schedule.directions):
            rank = placement.rank_of(stage, direction)
            has = {op: Action(stage, op, microbatch) in seen for op in COMPUTE_OPS}
            forward = Action(stage, Op.F, microbatch)
            whole = Action(stage, Op.B, microbatch)
            if not has[Op.F]:
                return _missing_forward(rank, forward, seen)
            if has[Op.B] and (has[Op.I] or has[Op.W]):
                twin = Action(stage, Op.I if has[Op.I] else Op.W, microbatch)
                return fault_at(
                    rank,
                    whole,
                    f"and {twin} would add the same gradient twice (B is I and W in one)",
                    related=(twin,),
                )
            if not has[Op.B] and not (has[Op.I] or has[Op.W]):
                return _missing(
                    rank, whole, f"is missing: {forward} has no backward", related=(forward,)
                )
            for op, other in ((Op.I, Op.W), (Op.W, Op.I)):
                if not has[Op.B] and not has[op]:
                    present = Action(stage, other, microbatch)
                    return _missing(
                        rank,
                        Action(stage, op, microbatch),
                        f"is missing beside {present} (a backward is one B, or an I and a W)",
                        related=(present,),
                    )
    return None


def _missing_forward(rank: int, forward: Action, seen: set[Action]) -> Fault:
    """A micro-batch with hardly an action is rather a slip in these than a lack of all others."""
    others = sorted(
        (a for a in seen if a.microbatch == forward.microbatch), key=lambda a: (a.stage, a.op)
    )
    if len(others) > _SLIP:
        return _missing(rank, forward, "is missing")
    return _missing(
        rank,
        forward,
        f"is missing: of micro-batch {forward.microbatch} there is nothing but "
        f"{' and '.join(map(str, others))}",
        related=tuple(others),
    )


def _missing(
    rank: int, action: Action, problem: str, *, related: tuple[Action, ...] = ()
) -> Fault:
    return replace(fault_at(rank, action, problem, related=related), is_missing=True)
