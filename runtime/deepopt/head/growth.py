"""Looks for the devices that a job has lost, and takes them in again between two steps."""

from __future__ import annotations

from deepopt.cluster.group import PlaceFound
from deepopt.errors import PlanError
from deepopt.head.former import Former
from deepopt.head.generation import Generation
from deepopt.head.record import JobRecord
from deepopt.head.resize import grows_now
from deepopt.head.state import JobState

SEEK_S = 5.0  # between two looks at a place where Ray says that there is nothing


class Growth:
    """Lets a job that has shrunk grow again.

    Args:
        record: of the job.
        former: forms the larger group.
    """

    def __init__(self, record: JobRecord, *, former: Former) -> None:
        self._record = record
        self._former = former
        self._found_s: dict[int, float] = {}
        self._sought_s = 0.0

    def take(self, event: PlaceFound) -> None:
        """Take note that a place has a process again, or none any more."""
        self._found_s.pop(event.place, None)
        if event.is_there:
            self._found_s[event.place] = self._record.clock.monotonic_s()

    def look(self, generation: Generation, *, now_s: float) -> None:
        """Seek what is missing; ask the workers to leave their group when a larger one can form.

        Args:
            generation: the group at work.
            now_s: the time.
        """
        record = self._record
        missing = record.missing_places
        self._found_s = {p: s for p, s in self._found_s.items() if p in missing}
        faults = record.job.faults
        running = record.state is JobState.RUNNING and record.faults.open is None
        if not missing or not running or faults.grow_after_s is None or generation.leaving:
            return
        if now_s - self._sought_s >= SEEK_S:
            self._sought_s = now_s
            record.group.seek(missing)
        if grows_now(
            self._found_s,
            missing=missing,
            resized_s=record.shrunk_s,
            now_s=now_s,
            faults=faults,
        ):
            generation.leaving = True
            record.group.request_leave()

    def form(self, generation: Generation) -> None:
        """Form the larger group, of workers that have left theirs after the same step; the same one where the
        job stops, which it does after a step of it.

        Args:
            generation: that they have left.
        """
        record = self._record
        if record.state is JobState.STOPPING:  # asked to after they had agreed to leave
            self._former.form(reason="asked to stop", before=generation)
            return
        there = sorted({*record.places, *self._found_s})
        reason = f"grew to {len(there)} workers"
        try:
            self._former.grow(there, reason=reason)
        except PlanError as problem:
            record.warn(f"{len(there)} workers are there, and no plan fits: {problem.message}")
        self._found_s.clear()
        record.move(JobState.RECOVERING, reason=reason)
        self._former.form(reason=reason, before=generation)
