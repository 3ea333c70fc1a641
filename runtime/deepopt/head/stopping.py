"""Stops a job on request: after the step in work, within a grace time, or at once."""

from __future__ import annotations

from deepopt.head.ending import Ending
from deepopt.head.record import JobRecord
from deepopt.head.state import ENDED, JobState
from deepopt.telemetry import events

EXIT_INTERRUPTED = 130


class Stopping:
    """Takes requests to stop.

    Args:
        record: of the job.
        ending: ends the job.
    """

    def __init__(self, record: JobRecord, *, ending: Ending) -> None:
        self._record = record
        self._ending = ending
        self._by_s: float | None = None
        self._key, self._grace_s = "faults.stop_grace_s", 0.0

    def request(self, *, preempted: str = "") -> None:
        """Stop after the step in work, with a checkpoint.

        Args:
            preempted: who got SIGTERM; empty when a person asked. What is not done within
                `faults.grace_s` is then left.
        """
        if self._record.state in ENDED or self._record.state is JobState.STOPPING:
            return
        faults = self._record.job.faults
        request = "preempt" if preempted else "stop"
        reason = f"preempted: {preempted} got SIGTERM" if preempted else "asked to stop"
        self._record.note("stop", request=request, who=preempted)
        self._record.board.tell(
            events.StopRequested(request=request, checkpoint=True, who=preempted)
        )
        generation = self._record.generation
        if self._record.state is JobState.RUNNING and generation and not generation.failures:
            self._record.move(JobState.STOPPING, reason=reason)
            grace_s = faults.grace_s if preempted else faults.stop_grace_s
            self._by_s = self._record.clock.monotonic_s() + grace_s
            self._key = "faults.grace_s" if preempted else "faults.stop_grace_s"
            self._grace_s = grace_s
            self._record.group.request_stop()
        else:  # no step is in work
            self._ending.stopped(reason=reason)

    def kill(self) -> None:
        """End at once, without a checkpoint."""
        if self._record.state in ENDED:
            return
        self._record.note("stop", request="kill")
        self._record.board.tell(events.StopRequested(request="kill", checkpoint=False))
        self._ending.stopped(reason="killed on request", exit_code=EXIT_INTERRUPTED)

    def ends_late(self, *, now_s: float) -> bool:
        """End a job whose workers did not stop in time; whether it has been ended.

        Args:
            now_s: the time.
        """
        if self._by_s is None or now_s < self._by_s:
            return False
        self._record.warn(f"workers did not stop within {self._key} ({self._grace_s:g} s)")
        self._ending.stopped(reason="killed after the grace time")
        return True
