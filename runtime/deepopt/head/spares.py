"""When the processes that wait for a lost worker's place are started."""

from __future__ import annotations

from deepopt.head.record import JobRecord
from deepopt.head.state import JobState

# A new process imports the model and builds layers, without a fork server torch as well: up to
# seconds of a CPU, on the host of a group that has its recovery to finish. The next fault is rarely
# as near as the end of the step in work.
SPARE_WAIT_S = 5.0


class Spares:
    """Has spares started once the group has done a step that was not done before.

    Args:
        record: of the job.
    """

    def __init__(self, record: JobRecord) -> None:
        self._record = record

    def look(self, *, now_s: float) -> None:
        """Have those that are missing started, if it is time.

        A group whose step takes longer than `SPARE_WAIT_S` does not wait for its end: the start of
        a process is little beside such a step.

        Args:
            now_s: the time.
        """
        record, generation = self._record, self._record.generation
        if generation is None or generation.ready_s is None:
            return
        if record.state is not JobState.RUNNING:
            return  # they are counted when it runs again
        if generation.gets_on or now_s - generation.ready_s >= SPARE_WAIT_S:
            record.group.keep_spares(record.job.faults.spares)
