"""Which workers still live and get on: signs in, findings out; no clock and no process of its own.

A worker that is silent is first *suspect*; silent for the whole timeout, it is lost. A worker that
speaks and does not get on is stuck; its peers then stand still as well, waiting for it, so one of
them is chosen: rather one inside a computation than one that waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepopt.schedule.ir import RECEIVE_OPS, Op
from deepopt.worker.messages import Heartbeat

SUSPECT_SHARE = 1 / 3  # of the timeout: time for a second sign before the worker is given up
STALLED_SHARE = 1 / 2  # of the timeout: peers of a stuck worker stop soon after it, or before


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """When a worker counts as lost.

    Args:
        heartbeat_timeout_s: silence, `faults.heartbeat_timeout_s`.
        step_timeout_s: signs of life without progress, `faults.step_timeout_s`.
    """

    heartbeat_timeout_s: float
    step_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with a worker.

    Args:
        rank: the worker.
        kind: `suspect`, `silent` or `stuck`; the last two are reasons to kill it.
        message: one line with the values.
    """

    rank: int
    kind: str
    message: str


@dataclass(slots=True, kw_only=True)
class Signs:
    """The last signs of one worker.

    Args:
        heard_s: when it was last heard.
        moved_s: when it last got on.
        beat: its last heartbeat.
        suspect: whether it was found suspect and not heard since.
    """

    heard_s: float
    moved_s: float
    beat: Heartbeat
    suspect: bool = False


class Liveness:
    """Signs of the workers of one generation; a worker is watched from its first heartbeat on.

    Args:
        deadlines: when a worker counts as lost.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._signs: dict[int, Signs] = {}
        self._released: set[int] = set()

    def hear(self, beat: Heartbeat, *, now_s: float) -> None:
        """Take a heartbeat."""
        rank = beat.sender.rank
        if rank in self._released:
            return
        before = self._signs.get(rank)
        same = before is not None and (before.beat.progress, before.beat.step) == (
            beat.progress,
            beat.step,
        )
        moved_s = before.moved_s if before is not None and same else now_s
        self._signs[rank] = Signs(heard_s=now_s, moved_s=moved_s, beat=beat)

    def begin_steps(self, *, now_s: float) -> None:
        """Count progress from now on: the set-up is over."""
        for signs in self._signs.values():
            signs.moved_s = now_s

    def release(self, rank: int) -> None:
        """Watch a worker no longer: it has ended or failed."""
        self._released.add(rank)
        self._signs.pop(rank, None)

    def forgive(self, gap_s: float) -> None:
        """Move all signs forward: the head itself was not looking for that long."""
        for signs in self._signs.values():
            signs.heard_s += gap_s
            signs.moved_s += gap_s

    def last(self, rank: int) -> Heartbeat | None:
        """The last heartbeat of a worker; None before the first."""
        signs = self._signs.get(rank)
        return None if signs is None else signs.beat

    def age_s(self, rank: int, *, now_s: float) -> float | None:
        """Seconds since a worker was heard; None before the first heartbeat."""
        signs = self._signs.get(rank)
        return None if signs is None else max(0.0, now_s - signs.heard_s)

    def suspects(self) -> tuple[int, ...]:
        """The workers that are suspect now."""
        return tuple(sorted(rank for rank, signs in self._signs.items() if signs.suspect))

    def check(self, *, now_s: float, stepping: bool) -> list[Finding]:
        """What is wrong now; a suspect is told once, until it is heard again.

        Args:
            now_s: the time.
            stepping: whether progress is due, which is not so during the set-up.
        """
        timeout_s = self._deadlines.heartbeat_timeout_s
        findings = []
        for rank, signs in sorted(self._signs.items()):
            silence_s = now_s - signs.heard_s
            message = (
                f"no heartbeat for {silence_s:.1f} s (faults.heartbeat_timeout_s {timeout_s:g})"
            )
            if silence_s > timeout_s:
                findings.append(Finding(rank=rank, kind="silent", message=message))
            elif silence_s > timeout_s * SUSPECT_SHARE and not signs.suspect:
                signs.suspect = True
                findings.append(Finding(rank=rank, kind="suspect", message=message))
        if stepping and not any(finding.kind == "silent" for finding in findings):
            findings += self._find_stuck(now_s)
        return findings

    def _find_stuck(self, now_s: float) -> list[Finding]:
        timeout_s = self._deadlines.step_timeout_s
        still_s = {rank: now_s - signs.moved_s for rank, signs in self._signs.items()}
        if not still_s or max(still_s.values()) <= timeout_s:
            return []
        rank = choose_stuck(
            (rank, duration_s, self._signs[rank].beat.action)
            for rank, duration_s in still_s.items()
            if duration_s > timeout_s * STALLED_SHARE
        )
        action = self._signs[rank].beat.action or "no action (between actions or steps)"
        message = (
            f"no progress for {still_s[rank]:.1f} s in {action} "
            f"(faults.step_timeout_s {timeout_s:g})"
        )
        return [Finding(rank=rank, kind="stuck", message=message)]


def choose_stuck(stalled: Iterable[tuple[int, float, str]]) -> int:
    """The worker that the others most likely wait for.

    Args:
        stalled: rank, seconds without progress, and action in work of each worker that stands
            still; at least one. An empty action is the end of a step or the loading of data.

    Returns:
        A worker inside a computation or a send before one between actions before one that waits;
        of several the one that stands still longest.
    """

    def waiting(action: str) -> int:
        if not action:
            return 1
        return 2 if any(op in action for op in (*RECEIVE_OPS, Op.REDUCE)) else 0

    order = sorted((waiting(action), -still_s, rank) for rank, still_s, action in stalled)
    return order[0][2]
