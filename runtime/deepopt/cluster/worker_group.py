"""The worker group of a job on Ray actors: starts them, hears of their ends, kills them.

Events go to a callback from Ray's own threads, so nothing is polled: a dead process is heard of in
milliseconds. Processes that wait for a place are `waiting_workers`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.exceptions import ActorUnschedulableError, RayActorError, RayError

import ray
from deepopt.cluster.crash_log import read_crash
from deepopt.cluster.group import (
    STAGE_WORKER,
    AgentGone,
    ExportEnded,
    HeadEvent,
    WorkerGone,
    WorkerUp,
    how_gone,
)
from deepopt.cluster.node_agents import NodeAgents
from deepopt.cluster.slots import Slots
from deepopt.cluster.waiting_workers import WaitingWorkers
from deepopt.cluster.worker_process import WorkerProcess, when_answered
from deepopt.cluster.worker_starter import WORKER_NAME, WorkerStarter
from deepopt.config import JobConfig
from deepopt.errors import ClusterError
from deepopt.run_directory import RunDirectory
from deepopt.worker.adopted import Adopted, NewHead, Whereabouts
from deepopt.worker.messages import Assignment

logger = logging.getLogger(__name__)

_POLL_S = 0.01
_ADOPT_TIMEOUT_S = 5.0  # for a worker to answer a new head


@dataclass(slots=True, kw_only=True)
class _Members:
    generation: int
    workers: list[WorkerProcess]
    references: list[Any] = field(default_factory=list)


class RayWorkerGroup:
    """Worker processes of one generation at a time, as `cluster.group.WorkerGroup` has it.

    Args:
        slots: where workers may run.
        run: the run directory.
        head: handle of the head actor; workers send it messages.
        tell: takes events, from any thread.
        job: the resolved job.
        lease_s: time after which a host without a head ends its workers.
        stage_worker: import path of the class that does the work.
    """

    def __init__(
        self,
        *,
        slots: Slots,
        run: RunDirectory,
        head: Any,
        tell: Callable[[HeadEvent], None],
        job: JobConfig,
        lease_s: float,
        stage_worker: str = STAGE_WORKER,
    ) -> None:
        self._slots = slots
        self._run = run
        self._head = head
        self._tell = tell
        self._members = _Members(generation=0, workers=[])
        self._starter = WorkerStarter(slots, run_dir=run.root, stage_worker=stage_worker)
        self._waiting = WaitingWorkers(
            self._starter,
            slots=slots,
            run=run,
            tell=tell,
            # With layers where a process will need no device for them.
            warm_up=lambda actor: actor.wait_as_spare.remote(job, head, not slots.use_gpus),
        )
        self._agents = NodeAgents(head=head, lease_s=lease_s, lost=self._on_agent_gone)

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

        Raises:
            ClusterError: there are fewer places than workers.
        """
        if self._members.generation == generation:
            return
        if len(places) > len(self._slots.places):
            raise ClusterError(
                f"{len(places)} workers on {len(self._slots.places)} places",
                remedy="this is a bug in deepopt: please report it with the job file",
            )
        before, kept = self._members.workers, kept or {}
        workers = []
        for rank, place in enumerate(places):
            log_size = self._log_size(rank)
            worker = before[kept[rank]] if rank in kept else self._waiting.take(place)
            workers.append(worker or self._start(place, rank))
            workers[-1].log_size = log_size
        self._members = members = _Members(generation=generation, workers=workers)
        self._waiting.try_again()  # what was missing may be there now
        for rank, worker in enumerate(workers):
            if worker.pid:  # it runs already
                self._tell_up(members, rank)
                continue
            self._watch(
                members,
                worker.actor.whereabouts.remote(),
                partial(self._on_up, members, rank),
                partial(self._on_gone, members, rank),
            )
            members.references.append(worker.actor.warm_up.remote())

    def keep_spares(self, count: int) -> None:
        """Begin to start processes that wait for a place, until there are so many; none where the last ones
        could not even start, before the next group forms."""
        self._waiting.keep_spares(count, is_first=self._is_first)

    def seek(self, places: Collection[int]) -> None:
        """Look for devices at places that have none: with a process each, that waits for one."""
        self._waiting.seek(places, is_first=self._is_first)

    @property
    def warm_spares(self) -> int:
        """Processes that can take a place at once."""
        return self._waiting.num_warm_spares

    def adopt(
        self, generation: int, *, places: Sequence[int], store: tuple[str, int]
    ) -> dict[int, Adopted]:
        """Take over the workers of a generation whose head has died; others are killed.

        Args:
            generation: which.
            places: index of each rank's place.
            store: IP address and port of the new head's store.

        Returns:
            What was found, by rank; each is told by `WorkerUp` as well.
        """
        actors: list[Any] = []
        for name in ray.util.list_named_actors():
            if name.startswith(WORKER_NAME):
                with suppress(ValueError):  # it has ended meanwhile
                    actors.append(ray.get_actor(name))
        head = NewHead(handle=self._head, store_host=store[0], store_port=store[1])
        calls: dict[Any, Any] = {actor.adopt.remote(head): actor for actor in actors}
        answered: list[Any] = []
        if calls:
            answered, _ = ray.wait(
                list(calls), num_returns=len(calls), timeout=_ADOPT_TIMEOUT_S
            )
        found: dict[int, Adopted] = {}
        workers = [WorkerProcess(actor=None, ended=True, place=p) for p in places]
        for call, actor in calls.items():
            adopted = _answer(call) if call in answered else None
            sender = None if adopted is None else adopted.sender
            if adopted is None or sender is None or sender.generation != generation:
                ray.kill(actor, no_restart=True)
                continue
            found[sender.rank] = adopted
            workers[sender.rank] = WorkerProcess(
                actor=actor, log_size=self._log_size(sender.rank), place=places[sender.rank]
            )
        self._members = members = _Members(generation=generation, workers=workers)
        for rank, adopted in found.items():
            self._on_up(members, rank, adopted.whereabouts)
        return found

    def launch(self, assignments: Sequence[Assignment]) -> None:
        """Let each worker set up and run."""
        members = self._members
        for rank, assignment in enumerate(assignments):
            self._watch(
                members,
                members.workers[rank].actor.work.remote(assignment, self._head),
                self._tell,
                partial(self._on_gone, members, rank),
            )

    def interrupt(self) -> None:
        """End all waits of the workers on each other: their generation has ended."""
        members = self._members
        for worker in members.workers:
            if not worker.ended:
                members.references.append(worker.actor.interrupt.remote(members.generation))

    def request_stop(self) -> None:
        """Ask the workers to stop, with a checkpoint, after the step in work."""
        self._request("stop")

    def request_leave(self) -> None:
        """Ask the workers to leave their group after the step in work."""
        members = self._members
        for worker in members.workers:
            if not worker.ended:
                members.references.append(worker.actor.leave.remote(members.generation))

    def request_checkpoint(self) -> None:
        """Ask the workers for a checkpoint after the step in work."""
        self._request("checkpoint")

    def export(self, rank: int, *, checkpoint: str) -> None:
        """Ask a worker whose run has ended for the final weights."""
        members = self._members

        def failed(error: BaseException) -> None:
            if isinstance(error, RayActorError):
                # Said also when it was said before: its end only matters from now on.
                members.workers[rank].ended = False
                self._on_gone(members, rank, error)
                return
            cause = getattr(error, "cause", None) or error
            reason = getattr(cause, "message", None) or f"{type(cause).__name__}: {cause}"
            self._tell(
                ExportEnded(generation=members.generation, folder=None, reason=str(reason))
            )

        self._watch(
            members,
            members.workers[rank].actor.export.remote(checkpoint),
            lambda folder: self._tell(
                ExportEnded(generation=members.generation, folder=folder)
            ),
            failed,
        )

    def kill(self, rank: int) -> None:
        """Kill one worker."""
        self._members.workers[rank].kill()

    def watch(self, rank: int) -> None:
        """Have the agent of its host watch a worker that is up."""
        # Not when Ray tells of it: its threads may not wait for the name of an actor.
        worker = self._members.workers[rank]
        worker.agent = self._agents.on(worker.node_id)
        worker.agent.watch.remote(worker.pid)

    def renew_agent(self, host: str) -> None:
        """Start another agent on a host, and have it watch the workers there."""
        there = [worker for worker in self._members.workers if worker.host == host]
        for node_id in {worker.node_id for worker in there}:
            agent = self._agents.renew(node_id)
            for worker in there:
                worker.agent = agent
                agent.watch.remote(worker.pid)

    def confirm_exit(self, rank: int, *, how: str) -> None:
        """Tell of a process's end: its host's agent knows it before Ray does."""
        self._tell_gone(self._members, rank, how=how)

    def kill_all(self, *, timeout_s: float, but: Collection[int] = ()) -> None:
        """Kill all workers and wait until they are gone.

        Args:
            timeout_s: how long to wait at most.
            but: ranks that are left alone.

        Raises:
            ClusterError: some are still there after the timeout.
        """
        until_s = time.monotonic() + timeout_s
        doomed = [w for rank, w in enumerate(self._members.workers) if rank not in but]
        if not but:
            doomed += self._waiting.give_up()
        left = [worker for worker in doomed if not worker.is_gone()]
        for worker in left:
            worker.kill()
        while left and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            left = [worker for worker in left if not worker.is_gone()]
        if left:
            pids = ", ".join(str(worker.pid or "unknown") for worker in left)
            raise ClusterError(
                f"{len(left)} killed worker(s) are still there after {timeout_s:g} s, pid {pids}",
                remedy="a process that hangs in a driver or on a disk cannot be killed: look at "
                "the host",
            )

    # --- inside --------------------------------------------------------------------------

    @property
    def _is_first(self) -> bool:
        return not self._members.workers

    def _start(self, place: int, rank: int) -> WorkerProcess:
        actor = self._starter.start_worker(
            place, log=self._run.rank_log(rank), is_first=self._is_first
        )
        return WorkerProcess(actor=actor, place=place)

    def _log_size(self, rank: int) -> int:
        log = self._run.rank_log(rank)
        return log.stat().st_size if log.exists() else 0

    def _watch(
        self,
        members: _Members,
        reference: Any,
        done: Callable[[Any], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        members.references.append(reference)
        when_answered(reference, done=done, failed=failed)

    def _on_up(self, members: _Members, rank: int, found: Whereabouts) -> None:
        worker = members.workers[rank]
        worker.note(found, head_node_id=self._slots.head_node_id)
        self._starter.note_gpus(worker.place, found.gpus)
        self._tell_up(members, rank)

    def _tell_up(self, members: _Members, rank: int) -> None:
        worker = members.workers[rank]
        self._tell(
            WorkerUp(generation=members.generation, rank=rank, pid=worker.pid, host=worker.host)
        )

    def _on_agent_gone(self, node_id: str) -> None:
        for host in {w.host for w in self._members.workers if w.node_id == node_id}:
            self._tell(AgentGone(host=host))

    def _on_gone(self, members: _Members, rank: int, error: BaseException) -> None:
        logger.info("rank %d is gone; Ray says: %s", rank, str(error).strip())
        if isinstance(error, ActorUnschedulableError):
            self._tell_gone(members, rank, how="", no_place=True)
        elif isinstance(error, RayActorError):
            # Its host's agent says more, and may not be there yet, or be slower than Ray.
            self._tell_gone(members, rank, how=members.workers[rank].exit_words())
        else:
            self._tell_gone(members, rank, how=f"error: {str(error).strip().splitlines()[-1]}")

    def _tell_gone(
        self, members: _Members, rank: int, *, how: str, no_place: bool = False
    ) -> None:
        worker = members.workers[rank]
        if worker.ended:
            return
        worker.ended = True
        crash = read_crash(self._run.rank_log(rank), start=worker.log_size)
        reason = f"its process crashed: {crash.headline}" if crash.headline else how_gone(how)
        self._tell(
            WorkerGone(
                generation=members.generation,
                rank=rank,
                reason=reason,
                traceback=crash.text,
                no_place=no_place,
            )
        )

    def _request(self, what: str) -> None:
        for worker in self._members.workers:
            if not worker.ended:
                self._members.references.append(worker.actor.request.remote(what))


def _answer(call: Any) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        logger.info("a worker of the head before does not answer: %s", error)
        return None
