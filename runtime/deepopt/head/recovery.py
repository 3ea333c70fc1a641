"""What to do when a worker group has failed: whose fault it is, and what comes next. Pure.

Failures come in the order in which the head learnt of them. One of them is the culprit; the
others are victims, which the report folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import WorkersLostError
from deepopt.head.budgets import KEYS, Budget, Limits, Spent, bad_hosts, budget_of, count
from deepopt.head.liveness import Cause
from deepopt.worker.messages import Failure

WORDS = {
    Budget.WORKER: "lost worker group(s)",
    Budget.HOST: "lost host(s)",
    Budget.PREEMPTION: "preemption(s)",
    Budget.HEAD: "lost head(s)",
}
OWN_ERROR_KINDS = frozenset({"error", "setup"})  # it would fail again in the same way


@dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """The one failure that explains the others.

    Args:
        culprit: the failure to show first, with its traceback.
        victims: the others, in the order in which they came.
    """

    culprit: Failure
    victims: tuple[Failure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Form the next generation.

    Args:
        blame: why.
        budget: what the fault is counted as.
        left: further faults of this kind that the budget allows now.
        bad_hosts: hosts that had too many faults.
    """

    blame: Blame
    budget: Budget
    left: int
    bad_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """End the job as failed.

    Args:
        blame: why.
        exit_code: of the whole job.
        message: one line.
        remedy: the next step for the user; may be empty.
    """

    blame: Blame
    exit_code: int
    message: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAnyway:
    """End the job as stopped: it was asked to stop, and what was lost is in no checkpoint.

    Args:
        blame: what happened meanwhile.
    """

    blame: Blame


Verdict = Restart | Fail | StopAnyway


def find_culprit(failures: Sequence[Failure]) -> Blame:
    """Choose the failure that explains the others.

    A dead process comes first, then a lost device, then a worker's own error, then a hang, then the
    first victim.
    Of several of one kind the earliest counts; of one rank only its first word does.

    Args:
        failures: at least one, in the order in which the head learnt of them.
    """
    assert failures, "a failed worker group has at least one failure"
    first: dict[int, Failure] = {}
    for failure in failures:
        first.setdefault(failure.sender.rank, failure)
    order = {"death": 0, "device": 1, "setup": 2, "error": 2, "hang": 3, "peer": 4}
    culprit = min(first.values(), key=lambda failure: order[failure.kind])
    victims = tuple(failure for failure in first.values() if failure is not culprit)
    return Blame(culprit=culprit, victims=victims)


def cause_of(failure: Failure) -> str:
    """Why a worker was lost, one of `liveness.Cause`."""
    by_kind = {
        "death": Cause.EXIT,
        "setup": Cause.SETUP,
        "error": Cause.ERROR,
        "device": Cause.DEVICE,
        "peer": Cause.PEER,
    }
    return str(failure.cause or by_kind.get(failure.kind, Cause.SILENT))


def decide(
    failures: Sequence[Failure],
    *,
    spent: Sequence[Spent],
    limits: Limits,
    now_s: float,
    step_done: int,
    stopping: bool,
    preempted: frozenset[int] = frozenset(),
    needs_device: bool = False,
) -> Verdict:
    """What to do after a worker group has failed.

    Args:
        failures: at least one, in the order in which the head learnt of them.
        spent: faults before this one.
        limits: the budgets.
        now_s: the time.
        step_done: the last step that all have done.
        stopping: whether the job was asked to stop.
        preempted: ranks whose workers had been told to go.
        needs_device: whether the job can neither have another device nor do with fewer.
    """
    blame = find_culprit(failures)
    culprit = blame.culprit
    who = f"rank {culprit.sender.rank}" + (f" on {culprit.host}" if culprit.host else "")
    own = culprit.kind in OWN_ERROR_KINDS or (culprit.kind == "device" and needs_device)
    if own and culprit.exit_code != WorkersLostError.exit_code:
        starts = culprit.kind == "setup" or culprit.step == 0
        doing = "while starting" if starts else f"in step {culprit.step}"
        return Fail(
            blame=blame,
            exit_code=culprit.exit_code,
            message=f"{who} failed {doing}: {culprit.message}",
            remedy=culprit.remedy,
        )
    if stopping:
        return StopAnyway(blame=blame)
    budget = budget_of(cause_of(culprit), preempted=culprit.sender.rank in preempted)
    before = count(spent, budget, now_s=now_s, window_s=limits.window_s)
    most = limits.most[budget]
    if before >= most:
        key = f"faults.{KEYS[budget]}"
        return Fail(
            blame=blame,
            exit_code=WorkersLostError.exit_code,
            message=f"{before + 1} {WORDS[budget]} within faults.window_s ({limits.window_s:g} s), "
            f"{key} allows {most}; the last because of {who}: {culprit.message}",
            remedy=culprit.remedy
            or f"look at the culprit's log, then `deepopt resume`, or raise {key}",
        )
    this = Spent(budget=budget, at_s=now_s, step_done=step_done, host=culprit.host)
    return Restart(
        blame=blame,
        budget=budget,
        left=most - before - 1,
        bad_hosts=bad_hosts([*spent, this], limits=limits, now_s=now_s),
    )
