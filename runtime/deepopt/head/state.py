"""The states of a job and the transitions between them, as a table. Pure.

The controller alone changes a job's state, through `advance`.
"""

from __future__ import annotations

import enum

from deepopt.errors import DeepoptError


class JobState(enum.StrEnum):
    """What a job is doing, as `deepopt status` shows it."""

    STARTING = "starting"  # the first worker group of this launch is being formed
    RUNNING = "running"  # all workers are ready
    RECOVERING = "recovering"  # a worker group was lost, the next is being formed
    STOPPING = "stopping"  # asked to stop, the step in work is being finished
    STOPPED = "stopped"  # ended because asked to, can be resumed
    FINISHED = "finished"  # the last step is done
    FAILED = "failed"  # ended badly, the error says why


LEGAL: dict[JobState, frozenset[JobState]] = {
    JobState.STARTING: frozenset(
        {
            JobState.RUNNING,
            JobState.RECOVERING,
            JobState.STOPPING,
            JobState.STOPPED,
            JobState.FAILED,
        }
    ),
    JobState.RUNNING: frozenset(
        {
            JobState.RECOVERING,
            JobState.STOPPING,
            JobState.STOPPED,
            JobState.FINISHED,
            JobState.FAILED,
        }
    ),
    JobState.RECOVERING: frozenset(
        {JobState.RUNNING, JobState.STOPPING, JobState.STOPPED, JobState.FAILED}
    ),
    JobState.STOPPING: frozenset({JobState.STOPPED, JobState.FINISHED, JobState.FAILED}),
    # A resumed job starts again, whatever it ended as.
    JobState.STOPPED: frozenset({JobState.STARTING}),
    JobState.FINISHED: frozenset({JobState.STARTING}),
    JobState.FAILED: frozenset({JobState.STARTING}),
}

ENDED = frozenset({JobState.STOPPED, JobState.FINISHED, JobState.FAILED})


def advance(state: JobState, to: JobState) -> JobState:
    """The new state, if the table allows it.

    Args:
        state: the present state.
        to: the wanted one.

    Raises:
        DeepoptError: the transition is not in the table; a bug in deepopt.
    """
    if to not in LEGAL[state]:
        allowed = ", ".join(sorted(LEGAL[state]))
        raise DeepoptError(
            f"a job cannot go from {state} to {to}; from {state} it can go to: {allowed}",
            remedy="this is a bug in deepopt: please report it with the run's journal.jsonl",
        )
    return to
