"""The Ray shell of the controller: a named actor that takes messages and runs the loop.

Everything that happens goes through one inbox into one thread, so that the controller needs no
lock: workers' messages (`tell`), the group's events, requests of people (`request`).
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray
from deepopt.cluster.group import STAGE_WORKER, HeadEvent
from deepopt.cluster.slots import Slots
from deepopt.errors import DeepoptError
from deepopt.run_directory import RunDirectory
from deepopt.worker.preemption import on_sigterm
from deepopt.worker.process_output import redirect_output

logger = logging.getLogger(__name__)

INBOX = "inbox"  # concurrency group of one thread: messages keep their order
REQUESTS = "requests"
TICK_S = 0.1  # of deadlines; events are taken at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """The head that this one takes over from.

    Args:
        died_s: when it died, on this machine's monotonic clock.
        reason: what is known of its end.
    """

    died_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadArguments:
    """What the supervisor tells the head.

    Args:
        run_dir: the run directory with job, model and plan in it.
        job_id: the job.
        slots: where workers may run.
        node_ip: address of the head's host that workers reach it by.
        supervisor_pid: process id of the supervisor.
        stage_worker: import path of the class that does a worker's work.
        predecessor: None for the first head of a launch.
    """

    run_dir: str
    job_id: str
    slots: Slots
    node_ip: str
    supervisor_pid: int
    stage_worker: str = STAGE_WORKER
    predecessor: Predecessor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadEnded:
    """How the head ended.

    Args:
        state: of the job.
        exit_code: of the job.
    """

    state: str
    exit_code: int


class HeadActor:
    """The head of one launch.

    Args:
        arguments: what the supervisor tells it.
    """

    def __init__(self, arguments: HeadArguments) -> None:
        self._arguments = arguments
        self._run = RunDirectory(Path(arguments.run_dir))
        redirect_output(self._run.logs / "head.log")
        self._inbox: queue.SimpleQueue[HeadEvent | str] = queue.SimpleQueue()
        on_sigterm(lambda: self._inbox.put("preempt"))

    @ray.method(concurrency_group=INBOX)
    def tell(self, message: HeadEvent) -> None:
        """Take a worker's message."""
        self._inbox.put(message)

    @ray.method(concurrency_group=REQUESTS)
    def request(self, what: str) -> None:
        """Take a request: `stop`, `preempt`, `kill` or `checkpoint`."""
        self._inbox.put(what)

    @ray.method(concurrency_group=REQUESTS)
    def alive(self) -> int:
        """This process's id: it answers as long as it is not stopped."""
        return os.getpid()

    def run(self) -> HeadEnded:
        """Run the job to its end.

        Raises:
            DeepoptError: the head could not even begin.
        """
        from deepopt.cluster.worker_group import RayWorkerGroup
        from deepopt.head.journal import Journal, replay
        from deepopt.job_file import load_job

        arguments, run = self._arguments, self._run
        began_s = time.monotonic()
        job = load_job(run.job)
        journal = Journal(run.journal)
        group = RayWorkerGroup(
            slots=arguments.slots,
            run=run,
            head=ray.get_runtime_context().current_actor,
            tell=self._inbox.put,
            lease_s=job.faults.lease_s,
            job=job,
            stage_worker=arguments.stage_worker,
        )
        predecessor, found = arguments.predecessor, {}
        history = replay(journal.entries)
        generation = history.generation
        places = tuple(range(len(arguments.slots.places)))
        if predecessor is None:
            # First of all: the processes take longest, and import torch while this one does.
            group.prepare(generation + 1, places=places)

        from deepopt.checkpoint.store import CheckpointStore
        from deepopt.clock import SystemClock
        from deepopt.head.board import Board
        from deepopt.head.closing_report import make_report
        from deepopt.head.controller import Controller
        from deepopt.head.status import Identity
        from deepopt.planner.plan import Plan
        from deepopt.planner.skeleton import ModelSkeleton
        from deepopt.telemetry.files import read_json
        from deepopt.telemetry.trace import merge_steps
        from deepopt.worker.beats import BeatReader
        from deepopt.worker.rendezvous import serve_store

        store_server = serve_store(arguments.node_ip)
        if predecessor is not None:
            found = group.adopt(
                generation,
                places=history.places or places,
                store=(store_server.host, store_server.port),
            )
        board = Board(run, tensorboard=job.logging.tensorboard)
        logger.info("head is ready after %.1f s", time.monotonic() - began_s)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as executor:
            controller = Controller(
                run=run,
                job=job,
                skeleton=ModelSkeleton.from_json(read_json(run.model)),
                plan=Plan.from_json(read_json(run.plan)),
                identity=Identity(
                    job_id=arguments.job_id,
                    name=job.name,
                    last_step=job.training.steps,
                    supervisor_pid=arguments.supervisor_pid,
                ),
                group=group,
                store=CheckpointStore(
                    run.checkpoint_root(job.checkpoint.directory), keep=job.checkpoint.keep
                ),
                store_address=(store_server.host, store_server.port),
                journal=journal,
                board=board,
                executor=executor,
                clock=SystemClock(),
                make_report=make_report,
            )
            try:
                begin = controller.start
                if predecessor is not None:
                    begin = partial(
                        controller.take_over,
                        found,
                        died_s=predecessor.died_s,
                        reason=predecessor.reason,
                    )
                # What is imported stays, and need not be looked at in each full collection, which no
                # heartbeat is read in.
                gc.freeze()
                reader = BeatReader(partial(store_server.beats_of, arguments.job_id))
                drive(
                    controller,
                    self._inbox,
                    begin=begin,
                    read_beats=reader.read,
                )
            finally:
                merge_steps(run.traces)
                board.close()
                journal.close()
        assert controller.outcome is not None, "the loop ends with an outcome"
        return HeadEnded(
            state=str(controller.outcome.state), exit_code=controller.outcome.exit_code
        )


def drive(
    controller: Any,
    inbox: queue.SimpleQueue[HeadEvent | str],
    *,
    begin: Callable[[], None],
    read_beats: Callable[[int, int], Sequence[HeadEvent]] = lambda *_: (),
) -> None:
    """Give a controller events, signs of life and ticks until its job has ended.

    Args:
        controller: see `head.controller`.
        inbox: events and requests.
        begin: its first act.
        read_beats: the signs of life that have come from a generation of a size.
    """
    _guard(controller, begin)
    read_s = time.monotonic()
    while controller.outcome is None:
        for event in _take(inbox):
            _guard(controller, partial(_give, controller, event))
        now_s = time.monotonic()
        if now_s - read_s >= TICK_S and controller.members is not None:
            read_s = now_s
            _guard(controller, partial(_hear, controller, read_beats))
        _guard(controller, controller.tick)


def _hear(controller: Any, read_beats: Callable[[int, int], Sequence[HeadEvent]]) -> None:
    for beat in read_beats(*controller.members):
        controller.handle(beat)


def _give(controller: Any, event: HeadEvent | str) -> None:
    if not isinstance(event, str):
        controller.handle(event)
    elif event == "stop":
        controller.request_stop()
    elif event == "preempt":
        controller.request_stop(preempted="the job")
    elif event == "kill":
        controller.request_kill()
    else:
        controller.request_checkpoint()


def _guard(controller: Any, act: Callable[[], None]) -> None:
    """Let an error end the job, not the head: its end must still be written down."""
    try:
        act()
    except DeepoptError as error:
        controller.fail(error)
    except Exception as error:  # the process's edge
        logger.exception("the head failed")
        controller.fail(
            DeepoptError(
                f"the head failed: {type(error).__name__}: {error}",
                remedy="this is a bug in deepopt: please report it with logs/head.log; "
                "`deepopt resume` goes on from the newest checkpoint",
            )
        )


def _take(inbox: queue.SimpleQueue[HeadEvent | str]) -> list[HeadEvent | str]:
    """What is in the inbox; waits for a tick when there is nothing."""
    events: list[HeadEvent | str] = []
    try:
        events.append(inbox.get(timeout=TICK_S))
        while True:
            events.append(inbox.get_nowait())
    except queue.Empty:
        return events


def create_head(arguments: HeadArguments) -> Any:
    """Create the head on the calling driver's host.

    Args:
        arguments: what it is told.

    Returns:
        Its handle. It has no name: a driver that asks Ray for the name of a dead actor may be
        told for ever after that it is taken, and nobody looks the head up.
    """
    as_actor: Any = ray.remote  # its annotations lack concurrency groups
    return (
        as_actor(concurrency_groups={INBOX: 1, REQUESTS: 1})(HeadActor)
        .options(
            num_cpus=0,  # it does not take a worker's place
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(
                node_id=arguments.slots.head_node_id, soft=False
            ),
        )
        .remote(arguments)
    )
