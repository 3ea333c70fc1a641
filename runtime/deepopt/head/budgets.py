"""How many faults of each kind a job may have, in a sliding window; when to wait; which hosts are bad. Pure.

A long job has faults now and then and is none the worse for it; one that fails ten times in a row is
broken. So faults count for `faults.window_s` only, and each kind has a budget of its own: a host that
is lost, or taken away by its owner, says nothing against the job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from deepopt.config import FaultsConfig
from deepopt.head.liveness import Cause

BACKOFF_AFTER = 2  # recoveries in a row without a new step; a fault may hit two workers
BACKOFF_FIRST_S = 1.0  # before the next one; then doubled
BACKOFF_MOST_S = 30.0


class Budget(StrEnum):
    """What a fault is counted as."""

    WORKER = "worker"  # a worker died, hung, or lost its peers
    HOST = "host"  # a host, or the link to it
    PREEMPTION = "preemption"  # a worker that had been told to go
    HEAD = "head"  # the head's process


KEYS = {
    Budget.WORKER: "max_restarts",
    Budget.HOST: "max_host_losses",
    Budget.PREEMPTION: "max_preemptions",
    Budget.HEAD: "max_head_restarts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A fault that counts.

    Args:
        budget: as what.
        at_s: when, on the clock that `now_s` is read from.
        step_done: the last step that all had done.
        host: the culprit's; empty when unknown.
    """

    budget: Budget
    at_s: float
    step_done: int
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a job file allows.

    Args:
        most: faults of each kind within the window.
        window_s: how long a fault counts.
        bad_host_after: faults within the window that make a host a bad one.
    """

    most: Mapping[Budget, int]
    window_s: float
    bad_host_after: int


def limits_of(faults: FaultsConfig) -> Limits:
    """The limits that a job file asks for."""
    return Limits(
        most={budget: int(getattr(faults, key)) for budget, key in KEYS.items()},
        window_s=faults.window_s,
        bad_host_after=faults.bad_host_after,
    )


def budget_of(cause: str, *, preempted: bool) -> Budget:
    """What a fault is counted as.

    Args:
        cause: one of `liveness.Cause`.
        preempted: whether its worker had been told to go.
    """
    if cause == Cause.HEAD:
        return Budget.HEAD
    if preempted:
        return Budget.PREEMPTION
    return Budget.HOST if cause == Cause.UNREACHABLE else Budget.WORKER


def count(spent: Iterable[Spent], budget: Budget, *, now_s: float, window_s: float) -> int:
    """Faults of a kind within the window."""
    return sum(1 for one in spent if one.budget is budget and now_s - one.at_s < window_s)


def backoff_s(spent: Sequence[Spent], *, step_done: int) -> float:
    """How long to wait before a recovery: not at all, unless those before brought no new step.

    Args:
        spent: faults before this one, the newest last.
        step_done: the last step that all have done.
    """
    in_a_row = 0
    for one in reversed(spent):
        if one.step_done < step_done:
            break
        in_a_row += 1
    if in_a_row < BACKOFF_AFTER:
        return 0.0
    return min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2.0 ** (in_a_row - BACKOFF_AFTER))


def bad_hosts(spent: Iterable[Spent], *, limits: Limits, now_s: float) -> tuple[str, ...]:
    """Hosts that had so many faults within the window that people should look at them."""
    counts = Counter(
        one.host for one in spent if one.host and now_s - one.at_s < limits.window_s
    )
    return tuple(sorted(h for h, number in counts.items() if number >= limits.bad_host_after))


def spent_of(
    faults: Iterable[Mapping[str, Any]], *, now_s: float, now: datetime | None = None
) -> list[Spent]:
    """What a journal's faults have spent.

    Args:
        faults: as `FaultLog` writes them.
        now_s: the time on the clock that ages are counted back from.
        now: date and time; None: of this machine. A clock that was set back makes no fault younger
            than now.
    """
    now = now or datetime.now(tz=UTC)
    spent = []
    for fault in faults:
        if fault.get("budget") not in list(Budget):
            continue  # it ended the job, or is of an earlier version
        age_s = (now - datetime.fromisoformat(str(fault["time"]))).total_seconds()
        spent.append(
            Spent(
                budget=Budget(fault["budget"]),
                at_s=now_s - max(0.0, age_s),
                step_done=int(fault.get("step_done") or 0),
                host=str((fault.get("culprit") or {}).get("host") or ""),
            )
        )
    return spent
