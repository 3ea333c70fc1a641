"""The controller: takes events and ticks, and gives each to the part of the head that it concerns.

It has no thread, no process and no Ray: a loop gives it events (`handle`) and calls `tick`. The job's
state is in the `record`; the decisions are in `recovery`, `liveness` and `state`; processes belong to
the worker group; files for people to the board; checkpoints in work to the committer.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from deepopt.checkpoint.store import CheckpointStore
from deepopt.clock import Clock
from deepopt.cluster.group import (
    AgentGone,
    ExportEnded,
    GroupRefused,
    HeadEvent,
    PlaceFound,
    SpareGone,
    WorkerGone,
    WorkerGroup,
    WorkerUp,
)
from deepopt.cluster.node_agent import AgentWord, ProcessEnded
from deepopt.config import JobConfig
from deepopt.errors import CheckpointError, DeepoptError
from deepopt.head.account import Account
from deepopt.head.board import Board
from deepopt.head.ending import Ending
from deepopt.head.former import Former
from deepopt.head.generation import Generation
from deepopt.head.growth import Growth
from deepopt.head.hearing import Hearing
from deepopt.head.journal import Journal
from deepopt.head.liveness import Cause, Finding
from deepopt.head.losses import Losses
from deepopt.head.record import JobRecord, Outcome
from deepopt.head.shrinking import Shrinking
from deepopt.head.spares import Spares
from deepopt.head.state import ENDED, JobState
from deepopt.head.status import Identity
from deepopt.head.stopping import Stopping
from deepopt.head.takeover import Takeover
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry import events
from deepopt.worker.adopted import Adopted

PAUSE_S = 2.0  # between two ticks: more, and the head itself was not looking


class Controller:
    """One launch of one job.

    Args:
        run: the run directory.
        job: the resolved job.
        skeleton: the model.
        plan: who holds which layers.
        identity: the job's id, name, last step and supervisor.
        group: starts and kills workers.
        store: checkpoints.
        store_address: IP address and port of the rendezvous store.
        journal: decisions; its entries say how far earlier launches came.
        board: files for people.
        executor: runs commits, one at a time.
        clock: the time.
        make_report: makes the closing report.
        new_incarnation: makes a fresh uuid.
    """

    def __init__(
        self,
        *,
        run: RunDirectory,
        job: JobConfig,
        skeleton: ModelSkeleton,
        plan: Plan,
        identity: Identity,
        group: WorkerGroup,
        store: CheckpointStore,
        store_address: tuple[str, int],
        journal: Journal,
        board: Board,
        executor: Executor,
        clock: Clock,
        make_report: Callable[[JobRecord], Mapping[str, Any]] | None = None,
        new_incarnation: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._record = record = JobRecord(
            run=run,
            job=job,
            skeleton=skeleton,
            plan=plan,
            identity=identity,
            group=group,
            journal=journal,
            board=board,
            clock=clock,
        )
        self._account = account = Account(record)
        self._ending = ending = Ending(record, account=account, make_report=make_report)
        self._former = former = Former(
            record,
            store=store,
            store_address=store_address,
            executor=executor,
            new_incarnation=new_incarnation,
        )
        shrinking = Shrinking(record, former=former, ending=ending)
        self._losses = losses = Losses(
            record, account=account, former=former, shrinking=shrinking, ending=ending
        )
        self._growth = Growth(record, former=former)
        self._spares = Spares(record)
        self._stopping = stopping = Stopping(record, ending=ending)
        self._hearing = Hearing(
            record,
            account=account,
            losses=losses,
            shrinking=shrinking,
            ending=ending,
            stopping=stopping,
        )
        self._takeover = Takeover(record, account=account, former=former, losses=losses)
        self._ticked_s = clock.monotonic_s()

    @property
    def state(self) -> JobState:
        """Of the job."""
        return self._record.state

    @property
    def outcome(self) -> Outcome | None:
        """How the job ended; None before."""
        return self._record.outcome

    @property
    def members(self) -> tuple[int, int] | None:
        """Number and size of the generation that signs of life are wanted of; None for none."""
        generation = self._record.generation
        if generation is None or self._record.state in ENDED:
            return None
        return generation.number, len(generation.members)

    # --- from outside --------------------------------------------------------------------

    def start(self) -> None:
        """Journal the launch and form the first generation.

        Raises:
            DeepoptError: the journal cannot be written, or no checkpoint can be used.
        """
        self._record.spent.clear()  # somebody has looked at it and wants it to go on
        self._record.journal.append(
            "job",
            job_id=self._record.identity.job_id,
            last_step=self._record.identity.last_step,
        )
        self._record.journal.append(
            "plan",
            plan_id=self._record.plan.plan_id,
            fingerprint=self._record.plan.fingerprint(),
            plan=self._record.plan.to_json(),
        )
        self._record.note("state", state=str(self._record.state))
        self._record.board.tell(events.StateChanged(state=str(self._record.state)))
        self._former.form(reason="")

    def take_over(self, found: Mapping[int, Adopted], *, died_s: float, reason: str) -> None:
        """Go on with the worker group of a head that has died; its training has not stopped.

        Args:
            found: what the workers that live are doing, by rank.
            died_s: when the head died, on this machine's monotonic clock.
            reason: what is known of its end.

        Raises:
            DeepoptError: the journal cannot be written, or no checkpoint can be used.
        """
        self._takeover.begin(found, died_s=died_s, reason=reason)

    def request_stop(self, *, preempted: str = "") -> None:
        """Stop after the step in work, with a checkpoint.

        Args:
            preempted: who got SIGTERM; empty when a person asked. What is not done within
                `faults.grace_s` is then left.
        """
        self._stopping.request(preempted=preempted)

    def request_kill(self) -> None:
        """End at once, without a checkpoint."""
        self._stopping.kill()

    def request_checkpoint(self) -> None:
        """Write a checkpoint after the step in work."""
        if self._record.state is JobState.RUNNING:
            self._record.group.request_checkpoint()

    def fail(self, error: DeepoptError) -> None:
        """End as failed because of something that no worker did."""
        if self._record.state not in ENDED:
            self._ending.failed(error.message, remedy=error.remedy, exit_code=error.exit_code)

    def handle(self, event: HeadEvent) -> None:
        """Take one event; one of another generation is refused."""
        if self._record.state in ENDED:
            return
        generation = self._record.generation
        if isinstance(event, AgentGone):
            self._losses.renew_agent(event.host, why="has ended")
            return
        if isinstance(event, SpareGone):
            if event.given_up:
                self._record.warn(event.given_up)
            self._spares.look(now_s=self._record.clock.monotonic_s())
            return
        if isinstance(event, PlaceFound):
            self._growth.take(event)
            return
        if isinstance(event, AgentWord | ProcessEnded):
            if generation is not None:
                self._hearing.take_agent(generation, event)
            return
        if isinstance(event, WorkerUp | WorkerGone | ExportEnded | GroupRefused):
            if generation is None or event.generation != generation.number:
                return  # the group speaks of processes that the head itself has ended
            if isinstance(event, WorkerUp):
                member = generation.members[event.rank]
                member.pid, member.host = event.pid, event.host
                self._record.group.watch(event.rank)
            elif isinstance(event, WorkerGone):
                self._hearing.take_gone(generation, event)
            elif isinstance(event, ExportEnded):
                self._ending.take_export(generation, event)
            else:
                self.fail(event.error)
            return
        if generation is None or not generation.owns(event.sender):
            self._hearing.refuse(event)
            return
        self._hearing.take(generation, event)

    def tick(self) -> None:
        """Look at the clock: deadlines, commits, the end."""
        now_s = self._record.clock.monotonic_s()
        gap_s, self._ticked_s = now_s - self._ticked_s, now_s
        generation = self._record.generation
        if self._record.state in ENDED or generation is None:
            return
        if gap_s > PAUSE_S:  # the head was paused; its workers are not to blame
            generation.liveness.forgive(gap_s)
            generation.began_s += gap_s
        self._account.take_commits(generation.committer.poll())
        if generation.settle_by_s is not None:
            if self._losses.is_due(generation, now_s=now_s):
                self._losses.settle(generation)
        elif self._stopping.ends_late(now_s=now_s):
            return
        elif generation.has_ended and generation.has_left:
            self._account.take_commits(
                generation.committer.drain(timeout_s=self._ending.drain_timeout_s)
            )
            self._growth.form(generation)
        elif generation.has_ended:
            self._conclude(generation, now_s=now_s)
        else:
            self._losses.look(generation, now_s=now_s)
            self._growth.look(generation, now_s=now_s)
            self._spares.look(now_s=now_s)
        if self._record.state not in ENDED:
            self._record.show()

    def _conclude(self, generation: Generation, *, now_s: float) -> None:
        """All runs have ended: wait for the checkpoint, then the final weights, then end."""
        assert generation.ended_s is not None, "a generation that has ended knows when"
        if generation.exporting:
            if now_s - generation.ended_s > self._record.job.faults.step_timeout_s:
                self._losses.fence(
                    generation,
                    Finding(
                        rank=0,
                        kind="stuck",
                        cause=Cause.STUCK,
                        message="the export of the final weights hangs",
                        since_s=generation.ended_s,
                    ),
                )
            return
        if (
            generation.committer.busy
            and now_s - generation.ended_s < self._ending.drain_timeout_s
        ):
            return
        step = min(member.ended.step for member in generation.members if member.ended)
        progress = self._record.progress
        if step < self._record.identity.last_step:
            if progress.checkpoint_step != step:
                self._record.warn(f"step {step} is in no checkpoint: a resume repeats steps")
            self._ending.stopped(reason="asked to stop")
        elif generation.adopted and progress.checkpoint_step != step:
            # Its shards were told to the head before: they are written once more.
            self._record.move(
                JobState.RECOVERING, reason="the last checkpoint went with the last head"
            )
            self._former.form(reason="the last checkpoint is written again", before=generation)
        elif self._record.job.evaluation.alone:
            progress.step = step  # a prediction reports no step
            self._ending.end(JobState.FINISHED, exit_code=0)
        elif progress.checkpoint_step != step or progress.checkpoint_path is None:
            newest = progress.checkpoint_step
            self._ending.failed(
                f"the last step, {step}, is done, but its checkpoint could not be written; the "
                f"newest whole one is of step {newest}",
                remedy="see `checkpoint_failed` in events.jsonl, make room, `deepopt resume`",
                exit_code=CheckpointError.exit_code,
            )
        else:
            generation.exporting = True
            generation.ended_s = now_s
            self._record.group.export(0, checkpoint=progress.checkpoint_path)
