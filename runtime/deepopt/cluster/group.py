"""What the head asks of a worker group and hears from it; no process is touched here.

`cluster.worker_group` is the one with real processes; tests have another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from deepopt.cluster.node_agent import AgentWord, ProcessEnded
from deepopt.errors import DeepoptError
from deepopt.worker.messages import (
    Assignment,
    BadStep,
    CheckpointFailed,
    ExpertLoads,
    Failure,
    Heartbeat,
    Preempted,
    RunEnded,
    ShardsWritten,
    StepReport,
    WeightWork,
    WorkerReady,
)

STAGE_WORKER = "deepopt.worker.stage_worker:StageWorker"  # does the work in a worker's process


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUp:
    """A worker's process runs; its set-up has not begun.

    Args:
        generation: the worker group.
        rank: the worker.
        pid: process id on its host.
        host: host name.
    """

    generation: int
    rank: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """A worker's process is gone, or could not be started.

    Args:
        generation: the worker group.
        rank: the worker.
        reason: one line.
        traceback: what the process left behind; empty when nothing.
        no_place: whether it could not be started because its host is gone.
    """

    generation: int
    rank: int
    reason: str
    traceback: str = ""
    no_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportEnded:
    """The answer to `WorkerGroup.export`.

    Args:
        generation: the worker group.
        folder: what was written; None when it failed.
        reason: one line when it failed.
    """

    generation: int
    folder: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceFound:
    """A process that can work runs at a place that `WorkerGroup.seek` was asked for, or no longer.

    Args:
        place: index of the place.
        is_there: whether it runs.
    """

    place: int
    is_there: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRefused:
    """The cluster cannot hold the worker group.

    Args:
        generation: the worker group.
        error: why, with a remedy.
    """

    generation: int
    error: DeepoptError


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentGone:
    """The agent of a host has ended.

    Args:
        host: host name.
    """

    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpareGone:
    """A process that waited for a place has ended.

    Args:
        given_up: why no other is started before the next group forms; empty where one may be.
    """

    given_up: str = ""


WorkerMessage = (
    WorkerReady
    | StepReport
    | WeightWork
    | BadStep
    | ExpertLoads
    | ShardsWritten
    | CheckpointFailed
    | Heartbeat
    | Preempted
    | RunEnded
    | Failure
)
GroupEvent = WorkerUp | WorkerGone | ExportEnded | GroupRefused | PlaceFound
AgentEvent = AgentWord | ProcessEnded | AgentGone
HeadEvent = WorkerMessage | GroupEvent | AgentEvent | SpareGone


def how_gone(how: str) -> str:
    """How a process ended, as a sentence about a worker.

    Args:
        how: `process_look.exit_words`, or `error: ...`; empty when nobody knows.
    """
    if not how:
        return "its process is gone: killed, or out of memory"
    if how.startswith("killed"):
        return f"its process was {how}"
    return f"its process ended with {how}"


class WorkerGroup(Protocol):
    """The processes of one generation. Nothing but `kill_all` and `close` waits."""

    def prepare(
        self,
        generation: int,
        *,
        places: Sequence[int],
        kept: Mapping[int, int] | None = None,
    ) -> None:
        """Begin to start the processes of a generation; a repeated call changes nothing.

        Args:
            generation: which.
            places: index of each rank's place.
            kept: rank in the generation before, by new rank, of those whose process stays.
        """
        ...

    def keep_spares(self, count: int) -> None:
        """Begin to start processes that wait for a place, until there are so many; none where the last ones
        could not even start (`SpareGone.given_up`), before the next group forms."""
        ...

    def seek(self, places: Collection[int]) -> None:
        """Look for devices at places that have none, and for no others; answered by `PlaceFound`."""
        ...

    @property
    def warm_spares(self) -> int:
        """Processes that can take a place at once."""
        ...

    def launch(self, assignments: Sequence[Assignment]) -> None:
        """Let each worker set up and run; assignments are in the order of ranks."""
        ...

    def interrupt(self) -> None:
        """End all waits of the workers on each other: their generation has ended."""
        ...

    def request_stop(self) -> None:
        """Ask the workers to stop, with a checkpoint, after the step in work."""
        ...

    def request_leave(self) -> None:
        """Ask the workers to leave their group after the step in work."""
        ...

    def request_checkpoint(self) -> None:
        """Ask the workers for a checkpoint after the step in work."""
        ...

    def export(self, rank: int, *, checkpoint: str) -> None:
        """Ask a worker whose run has ended for the final weights; answered by `ExportEnded`."""
        ...

    def kill(self, rank: int) -> None:
        """Kill one worker."""
        ...

    def watch(self, rank: int) -> None:
        """Have the agent of its host watch a worker that is up; it answers by `AgentWord`."""
        ...

    def renew_agent(self, host: str) -> None:
        """Start another agent on a host, and have it watch the workers there."""
        ...

    def confirm_exit(self, rank: int, *, how: str) -> None:
        """A worker's process has ended, says its host's agent; answered by `WorkerGone`."""
        ...

    def kill_all(self, *, timeout_s: float, but: Collection[int] = ()) -> None:
        """Kill all workers and wait until they are gone.

        Args:
            timeout_s: how long to wait at most.
            but: ranks that are left alone.

        Raises:
            ClusterError: some are still there after the timeout.
        """
        ...
