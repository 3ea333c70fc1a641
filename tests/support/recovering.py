"""A group of real workers in plain processes that goes on after kills, with a small head in this process.

The data plane of recovery without Ray: survivors keep their processes, new ones take the place of the
dead, and the head's own pure rule (`head.survivors`) says where the next generation goes on from.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from deepopt.checkpoint.store import CheckpointStore
from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.head.formation import is_checkpoint_due
from deepopt.head.survivors import Restoration, restore
from deepopt.pipeline.weight_ways import Verdict
from deepopt.planner.plan import Plan
from deepopt.worker.messages import (
    Assignment,
    Failure,
    InPlace,
    RunEnded,
    Sender,
    ShardsWritten,
    Standing,
    StepReport,
    WeightWork,
    WorkerReady,
)
from deepopt.worker.rendezvous import serve_store
from deepopt.worker.stage_worker import StageWorker
from support.forking import fork_context
from support.worker_processes import Outcome, commit

TIMEOUT_S = 90.0
TOLD = "told by the head"  # the reason of a way that a worker has not tried itself


@dataclass
class Story:
    """What happened.

    Args:
        losses: by step; of a step that was reported twice, all that were said.
        restorations: of each generation after the first; None: from the newest checkpoint.
        pids: of each generation's ranks.
        back_s: seconds from each death to the next report of a step.
    """

    losses: dict[int, set[float]] = field(default_factory=dict)
    restorations: list[Restoration | None] = field(default_factory=list)
    pids: list[dict[int, int]] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    ended: dict[int, RunEnded] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)

    @property
    def loss_of_each_step(self) -> list[float]:
        assert all(len(said) == 1 for said in self.losses.values()), self.losses
        return [said for _, (said,) in sorted(self.losses.items())]


@dataclass(frozen=True)
class Resize:
    """Another plan for a generation and those after it.

    Args:
        plan: who holds what from now on.
        kept: rank in the generation before, by new rank, of processes that live on.
        leave_after: step after which the generation before is asked to leave; None: a fault ends it.
    """

    plan: Plan
    kept: Mapping[int, int]
    leave_after: int | None = None


class Worker:
    """A process that works on one assignment after the other."""

    def __init__(self) -> None:
        context = fork_context()
        self.inbox: Any = context.SimpleQueue()
        self.outbox, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(self.inbox, theirs), daemon=True)
        self.process.start()
        theirs.close()


class Drama:
    """Trains to the last step whatever dies on the way.

    Args:
        job: with the kills in `faults.inject`.
        plan: of all generations before the first resize.
        run_dir: the run directory.
        last_step: run through this step.
        spares: processes that wait for somebody's death.
        resizes: by the generation that begins with it.
    """

    def __init__(
        self,
        job: JobConfig,
        plan: Plan,
        *,
        run_dir: Path,
        last_step: int,
        spares: int = 0,
        resizes: Mapping[int, Resize] | None = None,
    ) -> None:
        self._resizes = resizes or {}
        self._job = job
        self._plan = plan
        self._run_dir = run_dir
        self._last_step = last_step
        self._store_server = serve_store("127.0.0.1")
        self._checkpoints = CheckpointStore(run_dir / "checkpoints")
        self._generation = 0
        self._workers = {rank: Worker() for rank in range(plan.world_size)}
        self._spares = [Worker() for _ in range(spares)]
        self._died_s: float | None = None
        self._ways: dict[str, dict[str, Verdict]] = {}
        self._parts: dict[tuple[int, int], list[ShardsWritten]] = {}
        self.story = Story()

    def play(self) -> Story:
        """Run to the end."""
        try:
            self._form({})
            while True:
                standings = self._attend()
                if standings is None:
                    return self.story
                self._form(standings)
        finally:
            for worker in (*self._workers.values(), *self._spares):
                worker.process.kill()
                worker.process.join()

    def _form(self, standings: dict[int, Standing]) -> None:
        before = self._generation
        self._generation += 1
        if resize := self._resizes.get(self._generation):
            standings = self._resize(resize, standings)
        plan = self._plan
        start = restore(plan, survivors=standings) if standings else None
        if before:
            self.story.restorations.append(start)
        for rank in range(plan.world_size):
            if rank not in standings and before:
                self._workers[rank].process.kill()
                self._workers[rank] = self._spares.pop() if self._spares else Worker()
        checkpoint, step = None, 0
        if start is None:
            found = self._checkpoints.newest_verified(describe(self._job).fingerprint())
            if found is not None:
                checkpoint, step = str(found.path), found.manifest.step
        in_place = None
        if start is not None:
            step = start.step
            in_place = InPlace(
                previous_generation=before,
                transfers=start.transfers,
                report=step > max(self.story.losses, default=0),
                save=is_checkpoint_due(step, job=self._job, last_step=self._last_step),
            )
        self.story.pids.append({r: w.process.pid or 0 for r, w in self._workers.items()})
        for rank, worker in self._workers.items():
            sender = Sender(
                job_id="test",
                generation=self._generation,
                plan_id=plan.plan_id,
                rank=rank,
                incarnation=uuid.uuid4().hex,
            )
            worker.inbox.put(
                Assignment(
                    sender=sender,
                    store_host=self._store_server.host,
                    store_port=self._store_server.port,
                    job=self._job,
                    plan=plan,
                    run_dir=str(self._run_dir),
                    checkpoint=checkpoint,
                    start_step=step,
                    last_step=self._last_step,
                    in_place=in_place,
                    known_ways=self._ways,
                )
            )

    def _resize(self, resize: Resize, standings: dict[int, Standing]) -> dict[int, Standing]:
        old, self._plan = self._workers, resize.plan
        for rank in old.keys() - set(resize.kept.values()):
            old[rank].process.kill()
        self._workers = {
            rank: old[resize.kept[rank]] if rank in resize.kept else Worker()
            for rank in range(resize.plan.world_size)
        }
        return {new: standings[o] for new, o in resize.kept.items() if o in standings}

    def _attend(self) -> dict[int, Standing] | None:
        """Listen until all have ended, or all that live have left their group."""
        open_pipes = {worker.outbox: rank for rank, worker in self._workers.items()}
        standings: dict[int, Standing] = {}
        ended: dict[int, RunEnded] = {}
        lost: set[int] = set()
        until_s = time.monotonic() + TIMEOUT_S
        while len(ended) + len(lost) + len(standings.keys() - ended.keys()) < len(
            self._workers
        ):
            ready = wait(list(open_pipes), timeout=until_s - time.monotonic())
            assert ready, f"nothing heard for {TIMEOUT_S} s: {self.story}"
            for pipe in ready:
                rank = open_pipes[pipe]
                try:
                    message = pipe.recv()
                except EOFError:
                    del open_pipes[pipe]
                    self._died_s = time.monotonic()
                    lost.add(rank)
                    ended.pop(rank, None)
                    self._interrupt(but=lost)
                    continue
                self._take(message)
                if isinstance(message, RunEnded):
                    ended[rank] = message
                    standings[rank] = message.standing or Standing(
                        version=message.step, ready=False, layers=()
                    )
                elif isinstance(message, Failure):
                    assert message.standing is not None, message.traceback
                    standings[rank] = message.standing
                    self._interrupt(but=lost)
        if len(ended) == len(self._workers) and ended[0].reason != "left":
            self.story.ended = ended
            return None
        return standings

    def _commit(self, message: ShardsWritten) -> None:
        """Commit a checkpoint when all have written their part of it."""
        key = (message.sender.generation, message.step)
        parts = self._parts.setdefault(key, [])
        parts.append(message)
        if len(parts) == self._plan.world_size:
            outcome = Outcome(shards=parts)
            commit(outcome, self._job, self._plan, run_dir=self._run_dir)

    def _interrupt(self, *, but: set[int]) -> None:
        for rank, worker in self._workers.items():
            if rank not in but:
                worker.inbox.put(self._generation)

    def _take(self, message: Any) -> None:
        self.story.messages.append(message)
        if isinstance(message, ShardsWritten):
            self._commit(message)
        if isinstance(message, WeightWork):
            told = {name: replace(way, reason=TOLD) for name, way in message.ways.items()}
            self._ways.setdefault(message.conditions, {}).update(told)
        if isinstance(message, StepReport):
            self.story.losses.setdefault(message.step, set()).add(message.loss)
            coming = self._resizes.get(self._generation + 1)
            if coming is not None and coming.leave_after == message.step:
                self._workers[0].inbox.put(("leave", self._generation))
            if self._died_s is not None:
                self.story.back_s.append(time.monotonic() - self._died_s)
                self._died_s = None


def _serve(inbox: Any, outbox: Any) -> None:
    work: queue.SimpleQueue[Assignment] = queue.SimpleQueue()
    lock = threading.Lock()
    worker: StageWorker | None = None

    def tell(message: Any) -> None:
        with lock:
            outbox.send(message)

    def listen() -> None:
        while True:
            asked = inbox.get()
            if isinstance(asked, Assignment):
                work.put(asked)
            elif worker is not None and isinstance(asked, tuple):
                worker.request_leave(asked[1])
            elif worker is not None:
                worker.interrupt(asked)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        assignment = work.get()
        before = worker if worker is not None and worker.can_go_on else None
        goes_on = before is not None and before.fits(assignment)
        if goes_on:
            assert worker is not None
            worker.reassign(assignment)
        else:
            worker = StageWorker(assignment, report=tell, before=before)
        try:
            ready: WorkerReady = worker.rejoin() if goes_on else worker.setup()
            tell(ready)
            tell(worker.run())
        except Exception as error:  # noqa: BLE001 - the process's edge
            traceback.print_exc()
            worker.let_go()
            failure = worker.describe_failure(error)
            tell(replace(failure, traceback=failure.traceback[-2000:]))


def train_through_faults(
    job: JobConfig,
    plan: Plan,
    *,
    run_dir: Path,
    last_step: int,
    spares: int = 0,
    resizes: Mapping[int, Resize] | None = None,
) -> Story:
    """Train to the last step whatever dies on the way."""
    return Drama(
        job, plan, run_dir=run_dir, last_step=last_step, spares=spares, resizes=resizes
    ).play()
