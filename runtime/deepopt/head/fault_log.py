"""The report of each fault: who, why, how long each part of the recovery took, what was lost. Pure.

A fault is open from the first failure until a step is done that had not been done before. Times are
seconds on the head's monotonic clock; the date is for people.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepopt.clock import utc_now
from deepopt.head.generation import with_exit
from deepopt.head.liveness import Cause
from deepopt.head.recovery import Blame
from deepopt.head.status import failure_json
from deepopt.planner.plan import Plan
from deepopt.worker.messages import Failure

FAULTS_SHOWN = 50  # of a long run, the newest
FAULTS_NAMED_LATE = 4  # that are over, and whose processes' ends may still be told of
VICTIMS_SHOWN = 16  # of a fault; a large group's would fill status file and journal
TRACEBACK_CHARACTERS = 4000  # of the end of a traceback, which says what happened


@dataclass(slots=True, kw_only=True)
class FaultRecord:
    """One fault.

    Args:
        number: 1-based, over all launches of the job.
        generation: the worker group that it hit.
        step_done: the last step that all had done.
        since_s: the first sign of it: when a process ended, its agent says; the last good sign of one that
            was silent or stuck; else when the failure was noticed.
        noticed_s: when the first failure came, or a worker was given up.
        time: date and time for people.
        blame: culprit and victims; None until the verdict.
        cause: one of `liveness.Cause`.
        budget: one of `budgets.Budget`; empty when it ended the job.
        next: what was decided, in words.
        outcome: `open`, `recovered`, `interrupted` by another fault, `stopped` or `failed`.
        decided_s: when the verdict was there.
        fenced_s: when all processes that had to go were gone.
        ready_s: when the next worker group was ready.
        restore_s: longest time that a worker took to load its state.
        done_s: when a step was done that had not been done before.
        start_step: step that the next worker group began after.
        source: where its state came from, in words.
        plan: of the worker group that it hit; None: as the job's is now.
    """

    number: int
    generation: int
    step_done: int
    since_s: float
    noticed_s: float
    time: str = field(default_factory=utc_now)
    blame: Blame | None = None
    cause: str = ""
    budget: str = ""
    next: str = ""
    outcome: str = "open"
    decided_s: float | None = None
    fenced_s: float | None = None
    ready_s: float | None = None
    restore_s: float = 0.0
    done_s: float | None = None
    start_step: int | None = None
    source: str = ""
    plan: Plan | None = None

    @property
    def is_judged(self) -> bool:
        """Whether it is known whose fault it was."""
        return self.blame is not None or self.cause == Cause.HEAD

    def name_exit(self, pid: int, *, host: str, words: str, at_s: float) -> bool:
        """Take an agent's word on how a process ended that was judged before it came.

        Args:
            pid: of the process.
            host: where it was.
            words: `process_look.exit_words`.
            at_s: when the agent saw it.

        Returns:
            Whether the process is one of this fault.
        """
        failures = () if self.blame is None else (self.blame.culprit, *self.blame.victims)
        if self.blame is None or all((f.pid, f.host) != (pid, host) for f in failures):
            return False
        culprit = self.blame.culprit
        if culprit.kind == "death" and (culprit.pid, culprit.host) == (pid, host):
            self.since_s = min(self.since_s, at_s)

        def named(failure: Failure) -> Failure:
            is_it = (failure.pid, failure.host) == (pid, host)
            return with_exit(failure, words) if is_it else failure

        self.blame = Blame(
            culprit=named(self.blame.culprit),
            victims=tuple(named(victim) for victim in self.blame.victims),
        )
        return True

    def times_s(self) -> dict[str, float]:
        """Seconds by part, those that are over; `total` from the first sign to the end."""
        times = {"detect": self.noticed_s - self.since_s}
        marks = [("decide", self.decided_s), ("fence", self.fenced_s)]
        last_s = self.noticed_s
        for name, mark_s in marks:
            if mark_s is not None:
                times[name], last_s = mark_s - last_s, mark_s
        if self.ready_s is not None:
            restore_s = min(self.restore_s, self.ready_s - last_s)
            times["rendezvous"] = self.ready_s - last_s - restore_s
            times["restore"], last_s = restore_s, self.ready_s
        if self.done_s is not None:
            times["replay"] = self.done_s - last_s
            times["total"] = self.done_s - self.since_s
        return {name: round(max(0.0, s), 3) for name, s in times.items()}

    def to_json(self, plan: Plan | None) -> dict[str, Any]:
        """For `status.json`, the journal and events.

        Args:
            plan: tells the stages of the ranks.
        """
        blame, plan = self.blame, self.plan or plan
        replayed = None
        if self.start_step is not None and self.start_step < self.step_done:
            replayed = [self.start_step + 1, self.step_done]
        return {
            "number": self.number,
            "time": self.time,
            "generation": self.generation,
            "cause": self.cause,
            "budget": self.budget,
            "culprit": None if blame is None else _shown(blame.culprit, plan=plan),
            "victims": []
            if blame is None
            else [
                {**_shown(v, plan=plan), "traceback": ""} for v in blame.victims[:VICTIMS_SHOWN]
            ],
            "num_victims": 0 if blame is None else len(blame.victims),
            "step_done": self.step_done,
            "replayed_steps": replayed,
            "lost_steps": 0,
            "source": self.source,
            "next": self.next,
            "outcome": self.outcome,
            "times_s": self.times_s(),
        }


def _shown(failure: Failure, *, plan: Plan | None) -> dict[str, Any]:
    shown = failure_json(failure, plan=plan)
    shown["traceback"] = str(shown["traceback"])[-TRACEBACK_CHARACTERS:]
    return shown


class FaultLog:
    """The faults of a job; at most one is open.

    Args:
        earlier: faults of earlier launches or heads, as `to_json` made them.
    """

    def __init__(self, earlier: list[dict[str, Any]] | None = None) -> None:
        self._closed = list(earlier or ())
        self._lately = deque[FaultRecord](maxlen=FAULTS_NAMED_LATE)  # closed ones
        self._count = max((int(fault["number"]) for fault in self._closed), default=0)
        self.open: FaultRecord | None = None

    def notice(
        self,
        *,
        generation: int,
        step_done: int,
        since_s: float,
        now_s: float,
        plan: Plan | None,
    ) -> FaultRecord:
        """A failure has come; the fault that is open already, or a new one.

        Args:
            generation: the worker group that it hit.
            step_done: the last step that all had done.
            since_s: the first sign of it.
            now_s: the time.
            plan: tells the stages of the ranks.
        """
        record = self.open
        same = record is not None and record.generation == generation
        if record is not None and same and record.cause != Cause.HEAD:
            record.since_s = min(record.since_s, since_s)
            return record
        if record is not None:  # it came before the one before was over
            step_done = max(step_done, record.step_done)
            self.close("interrupted", plan=plan)
        self._count += 1
        self.open = FaultRecord(
            number=self._count,
            generation=generation,
            step_done=step_done,
            since_s=min(since_s, now_s),
            noticed_s=now_s,
            plan=plan,
        )
        return self.open

    def close(self, outcome: str, *, plan: Plan | None) -> dict[str, Any] | None:
        """The open fault is over.

        Args:
            outcome: see `FaultRecord`.
            plan: tells the stages of the ranks.

        Returns:
            It as JSON; None when none was open.
        """
        record, self.open = self.open, None
        if record is None:
            return None
        record.outcome = outcome
        record.plan = record.plan or plan
        closed = record.to_json(plan)
        self._closed.append(closed)
        self._lately.append(record)
        del self._closed[:-FAULTS_SHOWN]
        return closed

    def name_exit(
        self, pid: int, *, host: str, words: str, at_s: float
    ) -> dict[str, Any] | None:
        """Take an agent's word that comes when its group has been replaced, or even when the fault is over: a
        busy host's agent may be slower than a recovery.

        Args:
            pid: of the process.
            host: where it was.
            words: `process_look.exit_words`.
            at_s: when the agent saw it.

        Returns:
            A fault that is over and reads otherwise now, as JSON.
        """
        if self.open is not None and self.open.name_exit(
            pid, host=host, words=words, at_s=at_s
        ):
            return None
        for record in self._lately:
            if record.name_exit(pid, host=host, words=words, at_s=at_s):
                told = record.to_json(None)
                self._closed = [
                    told if fault["number"] == told["number"] else fault
                    for fault in self._closed
                ]
                return told
        return None

    def to_json(self, plan: Plan | None) -> list[dict[str, Any]]:
        """All faults that are shown, the newest last."""
        faults = list(self._closed)
        if self.open is not None and self.open.is_judged:
            faults.append(self.open.to_json(plan))
        return faults


def faults_of(entries: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The faults that a journal tells of, for a `FaultLog`.

    Args:
        entries: the last word on each fault, by its number.
    """
    faults = [dict(entries[number]) for number in sorted(entries)]
    for fault in faults:
        if fault.get("outcome") == "open":
            fault["outcome"] = "interrupted"
    return faults[-FAULTS_SHOWN:]
