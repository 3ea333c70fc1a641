"""The Ray shell around `StageWorker`: one process, its log, its messages, its signs of life.

Training runs in the actor's default thread; requests come in by a concurrency group of their own,
so that they are heard while a step runs. torch is imported by `warm_up`, not with this module.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from deepopt.config import JobConfig
from deepopt.run_directory import RunDirectory
from deepopt.worker.adopted import Adopted, NewHead, Whereabouts
from deepopt.worker.beats import BeatSender
from deepopt.worker.mailbox import Mailbox
from deepopt.worker.messages import (
    Assignment,
    Failure,
    Preempted,
    RunEnded,
    WeightWork,
    WorkerReady,
)
from deepopt.worker.preemption import on_sigterm
from deepopt.worker.process_output import redirect_output

logger = logging.getLogger(__name__)

_ray: Any = ray  # its annotations are half there, and wrong where they are

REQUESTS = "requests"  # concurrency group of calls that are answered while a step runs
STAY = "stay"  # ... of the call that is pending as long as the process lives
FLUSH_TIMEOUT_S = 60.0  # for the head to take the last messages of a run


class WorkerActor:
    """The process of one rank, in one generation after the other.

    Args:
        log: file for what it prints until it has a rank.
        run_dir: the run directory.
        stage_worker: import path of the class that does the work.
    """

    def __init__(self, *, log: str, run_dir: str, stage_worker: str) -> None:
        self._log = Path(log)
        self._run = RunDirectory(Path(run_dir))
        redirect_output(self._log)
        self._warmth: Any = None
        self._stage_worker = stage_worker
        self._worker: Any = None
        self._mailbox: Mailbox | None = None
        self._asked: set[str] = set()
        self._lock = threading.Lock()
        self._assignment: Assignment | None = None
        self._ready: WorkerReady | None = None
        self._ended: RunEnded | Failure | None = None
        self._weight_work: WeightWork | None = None
        self._is_adopted = False  # the head that called `work` is dead
        self._is_preempted = False
        self._ended_generation = 0  # the newest that it was told has ended
        self._store_address = ("", 0)  # of the head that is there now
        self._tell_preempted: Callable[[], None] = lambda: None
        if not on_sigterm(self._on_sigterm):
            logger.warning("SIGTERM will end this process at once: not in the main thread")

    def whereabouts(self) -> Whereabouts:
        """Where this process is."""
        return Whereabouts(
            pid=os.getpid(),
            host=socket.gethostname(),
            node_id=ray.get_runtime_context().get_node_id(),
            gpus=tuple(_ray.get_runtime_context().get_accelerator_ids().get("GPU", ())),
        )

    def use_gpus(self, ids: tuple[str, ...]) -> None:
        """Take the GPUs of the worker whose place this process takes; before it touches any.

        Args:
            ids: as `whereabouts` of that worker told them.
        """
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ids)

    def warm_up(self) -> None:
        """Import what the work needs, while the head is still busy; errors come up in `work`."""
        try:
            self._load_class()
        except Exception:  # said again, and reported, by `work`
            logger.exception("importing %s failed", self._stage_worker)

    def wait_as_spare(self, job: JobConfig, head: Any, builds: bool) -> None:
        """Get everything ready that does not depend on the rank.

        Args:
            job: the resolved job.
            head: as for `work`; a first call of it takes longer than those after it.
            builds: as for `StageWorker.warm`.
        """
        try:
            self._mailbox = Mailbox(head.tell.remote, wait=_wait, was_taken=_was_taken)
            _was_taken(head.alive.remote())
            self._warmth = self._load_class().warm(job, self._run.root, builds=builds)
        except Exception:  # said again, and reported, by `work`
            logger.exception("getting ready failed")

    @ray.method(concurrency_group=STAY)
    def stay(self) -> None:
        """Never return: whoever calls hears of this process's end."""
        threading.Event().wait()

    def work(self, assignment: Assignment, head: Any) -> RunEnded | Failure:
        """Set up and train; every error becomes a `Failure`. After one that names what the worker
        still has, a later call goes on with it in another generation.

        Args:
            assignment: who this worker is and what it shall do.
            head: handle of the head actor; takes messages by `tell`.
        """
        assignment = replace(assignment, node_ip=str(_ray.util.get_node_ip_address()))
        sender = assignment.sender
        log = self._run.rank_log(sender.rank)
        if log != self._log:
            self._log = log
            redirect_output(log)
        logger.info(
            "generation %d, rank %d, pid %d", sender.generation, sender.rank, os.getpid()
        )
        if self._mailbox is None:
            self._mailbox = Mailbox(head.tell.remote, wait=_wait, was_taken=_was_taken)
        mailbox = self._mailbox
        with self._lock:
            self._assignment, self._ready, self._ended = assignment, None, None
            self._is_adopted = False
            self._store_address = (assignment.store_host, assignment.store_port)
        self._tell_preempted = lambda: mailbox.post(Preempted(sender=sender))
        if self._is_preempted:
            self._tell_preempted()
        done = threading.Event()
        try:
            worker = self._worker
            before = worker if worker is not None and worker.can_go_on else None
            goes_on = before is not None and before.fits(assignment)
            if goes_on:
                worker.reassign(assignment)
            else:
                warmth, self._warmth = self._warmth, None
                worker = self._load_class()(
                    assignment,
                    report=partial(self._post, mailbox),
                    warmth=warmth,
                    before=before,
                )
                self._adopt(worker)
            threading.Thread(
                target=_beat,
                args=(
                    worker,
                    self._beat_sender(assignment),
                    mailbox,
                    done,
                    assignment.job.faults.heartbeat_s,
                ),
                name="heartbeat",
                daemon=True,
            ).start()
            self._ready = worker.rejoin() if goes_on else worker.setup()
            mailbox.post(self._ready)
            ended: RunEnded | Failure = worker.run()
        except BaseException as error:  # the process's edge: SystemExit of a model's code too
            logger.exception("rank %d failed", sender.rank)
            self._let_go()  # first: its peers wait for it
            ended = self._describe(error, assignment)
        finally:
            done.set()
        if not mailbox.flush(timeout_s=FLUSH_TIMEOUT_S):
            logger.warning("the head has not taken all messages in %g s", FLUSH_TIMEOUT_S)
        with self._lock:
            self._ended = ended
            if self._is_adopted:  # nobody waits for this call's answer
                mailbox.post(ended)
        return ended

    def export(self, checkpoint: str) -> str:
        """Write the final weights.

        Args:
            checkpoint: folder of the last checkpoint.

        Returns:
            The folder written.
        """
        return str(self._worker.export(checkpoint))

    @ray.method(concurrency_group=REQUESTS)
    def request(self, what: str) -> None:
        """Pass a request on, or keep it until there is a worker.

        Args:
            what: `stop` or `checkpoint`.
        """
        with self._lock:
            if self._worker is None:
                self._asked.add(what)
            else:
                _pass_on(self._worker, what)

    @ray.method(concurrency_group=REQUESTS)
    def leave(self, generation: int) -> None:
        """Ask all workers to leave their group after the step in work.

        Args:
            generation: which; nothing happens to a later one.
        """
        worker = self._worker
        if worker is not None:
            worker.request_leave(generation)

    @ray.method(concurrency_group=REQUESTS)
    def adopt(self, head: NewHead) -> Adopted:
        """Report to another head from now on: the one before has died. The run goes on meanwhile.

        Args:
            head: the new one.
        """
        found = Adopted(whereabouts=self.whereabouts())
        with self._lock:
            assignment, worker = self._assignment, self._worker
            if assignment is None or self._mailbox is None:
                return found
            if worker is not None:
                worker.move_store(head.store_host, head.store_port)
            self._is_adopted = True
            self._store_address = (head.store_host, head.store_port)
            self._mailbox.redirect(head.handle.tell.remote)
            if self._ended is not None:
                self._mailbox.post(self._ended)
            return replace(
                found,
                sender=assignment.sender,
                start_step=assignment.start_step,
                ready=self._ready,
                ended=self._ended,
                weight_work=self._weight_work,
            )

    @ray.method(concurrency_group=REQUESTS)
    def interrupt(self, generation: int) -> None:
        """End the worker's waits on its peers: its generation has ended.

        Args:
            generation: which; nothing happens to a later one.
        """
        with self._lock:
            worker, self._ended_generation = self._worker, generation
        if worker is not None:
            worker.interrupt(generation)

    def _on_sigterm(self) -> None:
        logger.warning("got SIGTERM: telling the head")
        self._is_preempted = True
        self._tell_preempted()

    def _beat_sender(self, assignment: Assignment) -> BeatSender | None:
        if "torch" not in sys.modules:  # not worth an import; a worker that trains has it
            return None
        from deepopt.worker.rendezvous import open_beat_store

        return BeatSender(
            address=lambda: self._store_address,
            connect=lambda address: open_beat_store(address, assignment.sender),
        )

    def _post(self, mailbox: Mailbox, message: Any) -> None:
        if isinstance(message, WeightWork):  # said once; a later head wants to know it, too
            self._weight_work = message
        mailbox.post(message)

    def _load_class(self) -> Any:
        module, _, name = self._stage_worker.partition(":")
        return getattr(importlib.import_module(module), name)

    def _adopt(self, worker: Any) -> None:
        with self._lock:
            self._worker = worker
            worker.interrupt(
                self._ended_generation
            )  # its peers may have failed before it began
            for what in self._asked:
                _pass_on(worker, what)

    def _describe(self, error: BaseException, assignment: Assignment) -> Failure:
        if self._worker is not None:
            described: Failure = self._worker.describe_failure(error)
            return described
        return Failure(  # deepopt itself could not be imported here
            sender=assignment.sender,
            kind="setup",
            step=0,
            action="",
            message=f"{type(error).__name__}: {error}",
            exit_code=3,
            remedy="install deepopt with its dependencies in the same place on every host",
            pid=os.getpid(),
            host=socket.gethostname(),
        )

    def _let_go(self) -> None:
        try:
            if self._worker is not None:
                self._worker.let_go()
        except Exception:  # the process's edge: its word to the head counts
            logger.exception("leaving the group failed")


def _pass_on(worker: Any, what: str) -> None:
    if what == "stop":
        worker.request_stop()
    else:
        worker.request_checkpoint()


def _beat(
    worker: Any,
    sender: BeatSender | None,
    mailbox: Mailbox,
    done: threading.Event,
    interval_s: float,
) -> None:
    while True:
        beat = worker.heartbeat()
        if sender is not None and sender.send(beat):
            mailbox.tidy()
        else:
            mailbox.post_if_idle(beat)
        if done.wait(interval_s):
            return


def _was_taken(reference: Any) -> bool:
    try:
        ray.get(reference)
    except Exception:  # noqa: BLE001 - whatever it is, the head has not taken it
        return False
    return True


def _wait(references: list[Any], timeout_s: float) -> list[Any]:
    if not references:
        return []
    _, left = ray.wait(references, num_returns=len(references), timeout=timeout_s)
    return list(left)
