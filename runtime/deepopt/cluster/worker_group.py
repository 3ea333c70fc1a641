"""The worker group of a job on Ray actors: starts them, hears of their ends, kills them.

Events go to a callback from Ray's own threads, so nothing is polled: a dead process is heard of in
milliseconds. Workers are killed by pid with SIGKILL, by the agent on their host and here, because
Ray's own kill is a message that a stopped process does not read.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.exceptions import ActorUnschedulableError, RayActorError, RayError
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

import ray
from deepopt.cluster.crash_log import read_crash
from deepopt.cluster.group import (
    STAGE_WORKER,
    AgentGone,
    ExportEnded,
    HeadEvent,
    PlaceFound,
    SpareGone,
    WorkerGone,
    WorkerUp,
    how_gone,
)
from deepopt.cluster.node_agents import NodeAgents
from deepopt.cluster.process_table import Process, find_process
from deepopt.cluster.slots import Slots
from deepopt.config import JobConfig
from deepopt.errors import ClusterError
from deepopt.run_directory import RunDirectory
from deepopt.worker.actor import REQUESTS, STAY, WorkerActor
from deepopt.worker.adopted import Adopted, NewHead, Whereabouts
from deepopt.worker.messages import Assignment

logger = logging.getLogger(__name__)

_ray: Any = ray  # its annotations are half there

WORKER_NAME = "worker-"
_POLL_S = 0.01
_SPARE_TRIES = (
    3  # starts of spares that fail in a row, each of seconds of CPU and a model's memory
)
_ADOPT_TIMEOUT_S = 5.0  # for a worker to answer a new head
_AGENT_TIMEOUT_S = 5.0  # for an agent's answer; its host may be gone


@dataclass(slots=True, kw_only=True)
class _Worker:
    actor: Any
    log_size: int
    place: int = 0
    pid: int = 0
    host: str = ""
    process: Process | None = None  # on the head's host only
    node_id: str = ""
    agent: Any = None
    ended: bool = False  # its actor is gone, says Ray
    warm: bool = False  # of a spare: it has everything ready
    waits: bool = False  # for a place; its end is then nobody's loss


@dataclass(slots=True, kw_only=True)
class _Members:
    generation: int
    workers: list[_Worker]
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
        self._stage_worker = stage_worker
        self._job = job
        self._members = _Members(generation=0, workers=[])
        # Ray tells of an end in a thread of its own, also while this very process is given a place.
        self._waiting = threading.Lock()  # for the next two, and for `waits` of those in them
        self._spares: list[_Worker] = []
        self._seekers: dict[int, _Worker] = {}  # by place
        self._num_spares_made = 0
        self._spares_failed = 0  # in a row, and since the group formed
        self._gpus: dict[int, tuple[str, ...]] = {}  # of each place
        self._agents = NodeAgents(head=head, lease_s=lease_s, lost=self._on_agent_gone)
        # Ray unpickles a class by its import path: workers need deepopt, not this process.
        as_actor: Any = ray.remote  # its annotations lack concurrency groups
        self._actor_class = as_actor(concurrency_groups={REQUESTS: 1, STAY: 1})(WorkerActor)

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
            if rank in kept:
                worker = before[kept[rank]]
                worker.log_size = self._log_size(rank)
                workers.append(worker)
            else:
                workers.append(
                    self._take_seeker(place, rank)
                    or self._take_spare(place, rank)
                    or self._start(place, rank)
                )
        self._members = members = _Members(generation=generation, workers=workers)
        self._spares_failed = 0  # what was missing may be there now
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
        while len(self._spares) < count and self._spares_failed < _SPARE_TRIES:
            self._start_spare()

    def seek(self, places: Collection[int]) -> None:
        """Look for devices at places that have none: with a process each, that waits for one."""
        with self._waiting:
            gone = [self._seekers.pop(place) for place in self._seekers.keys() - set(places)]
        for seeker in gone:
            self._kill(seeker)
        for place in places:
            if place not in self._seekers:
                self._start_seeker(place)

    @property
    def warm_spares(self) -> int:
        """Processes that can take a place at once."""
        return sum(spare.warm for spare in list(self._spares))

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
        workers = [_Worker(actor=None, log_size=0, ended=True, place=p) for p in places]
        for call, actor in calls.items():
            adopted = _answer(call) if call in answered else None
            sender = None if adopted is None else adopted.sender
            if adopted is None or sender is None or sender.generation != generation:
                ray.kill(actor, no_restart=True)
                continue
            found[sender.rank] = adopted
            workers[sender.rank] = _Worker(
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
        self._kill(self._members.workers[rank])

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
            with self._waiting:
                doomed += [*self._spares, *self._seekers.values()]
                self._spares, self._seekers = [], {}
        left = [worker for worker in doomed if not self._is_gone(worker)]
        for worker in left:
            self._kill(worker)
        while left and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            left = [worker for worker in left if not self._is_gone(worker)]
        if left:
            pids = ", ".join(str(worker.pid or "unknown") for worker in left)
            raise ClusterError(
                f"{len(left)} killed worker(s) are still there after {timeout_s:g} s, pid {pids}",
                remedy="a process that hangs in a driver or on a disk cannot be killed: look at "
                "the host",
            )

    # --- inside --------------------------------------------------------------------------

    def _start(self, place: int, rank: int) -> _Worker:
        log, gpus = self._run.rank_log(rank), self._gpus.get(place)
        worker = _Worker(
            actor=self._actor_class.options(**self._options(place, owns=gpus is None)).remote(
                log=str(log), run_dir=str(self._run.root), stage_worker=self._stage_worker
            ),
            log_size=self._log_size(rank),
            place=place,
        )
        if gpus:
            worker.actor.use_gpus.remote(gpus)
        return worker

    def _start_spare(self) -> None:
        number = self._num_spares_made
        self._num_spares_made += 1
        place = number % len(self._slots.places)  # all hosts in turn
        log = self._run.spare_log(number)
        spare = _Worker(
            actor=self._actor_class.options(**self._options(place, owns=False)).remote(
                log=str(log),
                run_dir=str(self._run.root),
                stage_worker=self._stage_worker,
            ),
            log_size=0,
            waits=True,
        )
        with self._waiting:
            self._spares.append(spare)

        def is_gone(error: BaseException) -> None:
            with self._waiting:
                if not spare.waits:
                    return  # it is a worker by now: its work tells of its end
                spare.ended = True  # who kills one without a process waits for this
                if spare not in self._spares:
                    return
                self._spares.remove(spare)
                if not spare.warm:
                    self._spares_failed += 1
                given_up = not spare.warm and self._spares_failed == _SPARE_TRIES
            logger.warning("a spare is gone: %s", error)
            if spare.warm:
                self._tell(SpareGone())
            elif given_up:
                self._tell(
                    SpareGone(
                        given_up=f"{_SPARE_TRIES} spares in a row ended before they were ready; none is "
                        f"started before the next group forms; the last one's log is {log}"
                    )
                )

        self._watch(
            self._members,
            spare.actor.whereabouts.remote(),
            lambda found: self._place(spare, found),
            is_gone,
        )

        def is_warm(_: None) -> None:
            spare.warm = True
            self._spares_failed = 0

        # An idle process that dies is told of by nothing but a call that is pending with it.
        self._watch(self._members, spare.actor.stay.remote(), lambda _: None, is_gone)

        self._watch(self._members, self._wait(spare.actor), is_warm, is_gone)

    def _start_seeker(self, place: int) -> None:
        number = self._num_spares_made
        self._num_spares_made += 1
        self._gpus.pop(place, None)  # of a host that may have come back: Ray gives it others
        seeker = _Worker(
            actor=self._actor_class.options(**self._options(place)).remote(
                log=str(self._run.spare_log(number)),
                run_dir=str(self._run.root),
                stage_worker=self._stage_worker,
            ),
            log_size=0,
            place=place,
            waits=True,
        )
        with self._waiting:
            self._seekers[place] = seeker

        def is_gone(error: BaseException) -> None:
            with self._waiting:
                if not seeker.waits:
                    return
                seeker.ended = True
                if self._seekers.get(place) is not seeker:
                    return
                del self._seekers[place]
            logger.info("nothing at place %d: %s", place, str(error).strip())
            self._tell(PlaceFound(place=place, is_there=False))

        def is_up(found: Whereabouts) -> None:
            self._place(seeker, found)
            if found.gpus:
                self._gpus[place] = found.gpus

        def is_warm(_: None) -> None:
            seeker.warm = True
            if self._seekers.get(place) is seeker:
                self._tell(PlaceFound(place=place, is_there=True))

        self._watch(self._members, seeker.actor.whereabouts.remote(), is_up, is_gone)
        self._watch(self._members, self._wait(seeker.actor), is_warm, is_gone)

    def _wait(self, actor: Any) -> Any:
        """Have a process get ready; with layers where it will need no device for them."""
        return actor.wait_as_spare.remote(self._job, self._head, not self._slots.use_gpus)

    def _take_seeker(self, place: int, rank: int) -> _Worker | None:
        """The process that waits at a place; None while it has no device."""
        with self._waiting:
            seeker = self._seekers.get(place)
            if seeker is None or not seeker.pid:
                return None
            seeker.waits = False
            del self._seekers[place]
        seeker.log_size = self._log_size(rank)
        return seeker

    def _take_spare(self, place: int, rank: int) -> _Worker | None:
        """A spare for a place, the readiest; on the host of its GPU, if it has one."""
        host = self._slots.places[place].node_id
        with self._waiting:
            fitting = [
                spare
                for spare in self._spares
                if host is None or spare.node_id == host or not self._slots.use_gpus
            ]
            if not fitting:
                return None
            spare = min(fitting, key=lambda s: (not s.warm, not s.pid))
            spare.waits = False
            self._spares.remove(spare)
        spare.log_size, spare.place = self._log_size(rank), place
        if gpus := self._gpus.get(place):
            spare.actor.use_gpus.remote(gpus)
        return spare

    def _log_size(self, rank: int) -> int:
        log = self._run.rank_log(rank)
        return log.stat().st_size if log.exists() else 0

    def _options(self, index: int, *, owns: bool = True) -> dict[str, Any]:
        """Of an actor for a place; one that does not own it is given what another had."""
        slots, place = self._slots, self._slots.places[index]
        options: dict[str, Any] = {
            # Detached: it lives on when this head dies, and the next one finds it by its name.
            "name": f"{WORKER_NAME}{uuid.uuid4().hex}",
            "lifetime": "detached",
            "num_cpus": int(owns and not slots.use_gpus),
            "num_gpus": int(owns and slots.use_gpus),
            "max_restarts": 0,  # the head restarts; so a death is heard of at once
            "max_task_retries": 0,
        }
        if place.bundle_index is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=slots.placement_group,
                placement_group_bundle_index=place.bundle_index,
            )
        elif place.node_id is not None:
            is_first = not self._members.workers
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                node_id=place.node_id if is_first else self._living_node(place.node_id),
                soft=False,
            )
        if slots.worker_environment:
            options["runtime_env"] = {"env_vars": dict(slots.worker_environment)}
        return options

    def _living_node(self, node_id: str) -> str:
        """The id that a host has now: it has another one when its Ray was started again."""
        nodes: list[Any] = _ray.nodes()
        address = next((n["NodeManagerAddress"] for n in nodes if n["NodeID"] == node_id), None)
        living = [
            n["NodeID"] for n in nodes if n["Alive"] and n["NodeManagerAddress"] == address
        ]
        return node_id if node_id in living or not living else str(living[-1])

    def _watch(
        self,
        members: _Members,
        reference: Any,
        done: Callable[[Any], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        members.references.append(reference)

        def settle(future: Any) -> None:
            try:
                error = future.exception()
                if error is None:
                    done(future.result())
                else:
                    failed(error)
            except Exception:  # Ray would swallow it
                logger.exception("an answer of a worker could not be taken")

        reference.future().add_done_callback(settle)

    def _on_up(self, members: _Members, rank: int, found: Whereabouts) -> None:
        self._place(members.workers[rank], found)
        if found.gpus:
            self._gpus[members.workers[rank].place] = found.gpus
        self._tell_up(members, rank)

    def _place(self, worker: _Worker, found: Whereabouts) -> None:
        worker.host, worker.node_id = found.host, found.node_id
        if found.node_id == self._slots.head_node_id:
            worker.process = find_process(found.pid)
        worker.pid = found.pid  # last: it says that the others are there

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
            self._tell_gone(members, rank, how="")
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

    def _kill(self, worker: _Worker) -> None:
        if worker.agent is not None:
            worker.agent.kill.remote([worker.pid])
        if worker.process is not None:  # the agent may be gone
            worker.process.send(signal.SIGKILL)
        ray.kill(worker.actor, no_restart=True)

    def _is_gone(self, worker: _Worker) -> bool:
        if worker.process is not None:
            return not worker.process.is_alive()
        if worker.agent is not None and not worker.ended:
            try:
                living = ray.get(worker.agent.living.remote(), timeout=_AGENT_TIMEOUT_S)
            except RayError:  # the agent is gone, and its host with it, or silent
                return worker.ended
            return worker.pid not in living
        return worker.ended


def _answer(call: Any) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        logger.info("a worker of the head before does not answer: %s", error)
        return None
