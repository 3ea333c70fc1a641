"""The controller: owns a job's state; takes events, lets pure functions decide, journals, acts.

It has no thread, no process and no Ray: a loop gives it events (`handle`) and calls `tick`. The
decisions are in `recovery`, `liveness` and `state`; processes belong to the worker group; files
for people to the board; checkpoints in work to the committer.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from deepopt.checkpoint import folders
from deepopt.checkpoint.store import CheckpointStore
from deepopt.clock import Clock, utc_now
from deepopt.cluster.group import (
    AgentGone,
    ExportEnded,
    GroupRefused,
    HeadEvent,
    WorkerGone,
    WorkerGroup,
    WorkerMessage,
    WorkerUp,
)
from deepopt.cluster.node_agent import AgentWord, ProcessEnded
from deepopt.config import JobConfig
from deepopt.errors import CheckpointError, DeepoptError, InputError
from deepopt.head import recovery
from deepopt.head.board import Board
from deepopt.head.budgets import Budget, Spent, backoff_s, limits_of, spent_of
from deepopt.head.commits import Committed, Committer, NotCommitted, Origin
from deepopt.head.fault_log import FaultLog, faults_of
from deepopt.head.formation import (
    Start,
    choose_start,
    is_checkpoint_due,
    make_assignments,
    open_generation,
)
from deepopt.head.generation import Generation, find_late_start, lost_worker
from deepopt.head.journal import Journal, replay
from deepopt.head.liveness import AGENT_RENEW_S, Cause, Finding
from deepopt.head.load_forecast import LoadForecast
from deepopt.head.measures import Pace, figures_of, metrics_line
from deepopt.head.prediction_report import load_prediction, prediction_error
from deepopt.head.state import ENDED, JobState, advance
from deepopt.head.status import Identity, Progress, error_of, status_of
from deepopt.head.survivors import restore
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry import events
from deepopt.telemetry.files import read_json_lines
from deepopt.worker.adopted import Adopted
from deepopt.worker.messages import (
    BadStep,
    CheckpointFailed,
    ExpertLoads,
    Failure,
    Heartbeat,
    InPlace,
    Preempted,
    RunEnded,
    ShardsWritten,
    Standing,
    StepReport,
    WeightWork,
    WorkerReady,
)

logger = logging.getLogger(__name__)

# After a worker's own error no group is formed; others may still have a word to add.
OWN_GRACE_S = 0.5
KILL_TIMEOUT_S = 20.0  # for processes to be gone after SIGKILL; a busy disk can hold them
PAUSE_S = 2.0  # between two ticks: more, and the head itself was not looking
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Args:
        state: finished, stopped or failed.
        exit_code: of the whole job.
    """

    state: JobState
    exit_code: int


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
        make_report: Callable[[Controller], Mapping[str, Any]] | None = None,
        new_incarnation: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self.job = job
        self.skeleton = skeleton
        self.plan = plan
        self.identity = identity
        self.progress = Progress()
        self.pace = Pace()
        self.load_forecast = LoadForecast()
        self.prediction = load_prediction(run, plan)
        self.generation: Generation | None = None
        self.state = JobState.STARTING
        self.outcome: Outcome | None = None
        self.run = run
        self._group = group
        self._store = store
        self._store_address = store_address
        self._journal = journal
        self._board = board
        self._executor = executor
        self._clock = clock
        self._make_report = make_report
        self._new_incarnation = new_incarnation
        history = replay(journal.entries)
        self._number = history.generation
        earlier = faults_of(history.faults)
        self.faults = FaultLog(earlier)
        self._spent = spent_of(
            [fault for fault in earlier if fault["number"] in history.counting],
            now_s=clock.monotonic_s(),
        )
        self._limits = limits_of(job.faults)
        self._hangs = 0  # workers killed for want of progress
        self._error: dict[str, Any] | None = None
        self._stop_by_s: float | None = None
        self._stop_key, self._stop_grace_s = "faults.stop_grace_s", 0.0
        self._ticked_s = clock.monotonic_s()
        self._tokens_seen: dict[int, int | None] = {0: 0}
        self._refused: set[tuple[str, str]] = set()
        self._data_fingerprint: str | None = None

    @property
    def next_generation(self) -> int:
        """The number that the next worker group will have."""
        return self._number + 1

    # --- from outside --------------------------------------------------------------------

    def start(self) -> None:
        """Journal the launch and form the first generation.

        Raises:
            DeepoptError: the journal cannot be written, or no checkpoint can be used.
        """
        self._spent.clear()  # somebody has looked at it and wants it to go on
        self._journal.append(
            "job", job_id=self.identity.job_id, last_step=self.identity.last_step
        )
        self._journal.append(
            "plan", plan_id=self.plan.plan_id, fingerprint=self.plan.fingerprint()
        )
        self._note("state", state=str(self.state))
        self._board.tell(events.StateChanged(state=str(self.state)))
        self._form(reason="")

    def take_over(self, found: Mapping[int, Adopted], *, died_s: float, reason: str) -> None:
        """Go on with the worker group of a head that has died; its training has not stopped.

        Args:
            found: what the workers that live are doing, by rank.
            died_s: when the head died, on this machine's monotonic clock.
            reason: what is known of its end.

        Raises:
            DeepoptError: the journal cannot be written, or no checkpoint can be used.
        """
        self._journal.append("head", found=sorted(found), reason=reason)
        self.progress.restarts = len(self._spent)
        self._recall()
        now_s = self._clock.monotonic_s()
        fault = self.faults.notice(
            generation=self._number,
            step_done=self.progress.step,
            since_s=died_s,
            now_s=now_s,
            plan=self.plan,
        )
        fault.cause, fault.budget = str(Cause.HEAD), str(Budget.HEAD)
        fault.decided_s = fault.fenced_s = now_s
        self._spent.append(Spent(budget=Budget.HEAD, at_s=now_s, step_done=self.progress.step))
        goes_on = bool(found) and all(worker.ready is not None for worker in found.values())
        if goes_on:
            fault.next = f"{len(found)} worker(s) of generation {self._number} go on"
        else:
            fault.next = f"generation {self.next_generation} begins"
        told = fault.to_json(self.plan)
        self._note("fault", fault=told)
        self._board.tell(events.FaultJudged(fault=told))
        if goes_on:
            self._adopt(found, now_s=now_s)
            return
        self._move(JobState.RECOVERING, reason=reason)
        self._group.kill_all(timeout_s=KILL_TIMEOUT_S)
        self._form(reason=reason)

    def request_stop(self, *, preempted: str = "") -> None:
        """Stop after the step in work, with a checkpoint.

        Args:
            preempted: who got SIGTERM; empty when a person asked. What is not done within
                `faults.grace_s` is then left.
        """
        if self.state in ENDED or self.state is JobState.STOPPING:
            return
        faults = self.job.faults
        request = "preempt" if preempted else "stop"
        reason = f"preempted: {preempted} got SIGTERM" if preempted else "asked to stop"
        self._note("stop", request=request, who=preempted)
        self._board.tell(events.StopRequested(request=request, checkpoint=True, who=preempted))
        generation = self.generation
        if self.state is JobState.RUNNING and generation and not generation.failures:
            self._move(JobState.STOPPING, reason=reason)
            grace_s = faults.grace_s if preempted else faults.stop_grace_s
            self._stop_by_s = self._clock.monotonic_s() + grace_s
            self._stop_key = "faults.grace_s" if preempted else "faults.stop_grace_s"
            self._stop_grace_s = grace_s
            self._group.request_stop()
        else:  # no step is in work
            self._end_stopped(reason=reason)

    def request_kill(self) -> None:
        """End at once, without a checkpoint."""
        if self.state in ENDED:
            return
        self._note("stop", request="kill")
        self._board.tell(events.StopRequested(request="kill", checkpoint=False))
        self._end_stopped(reason="killed on request", exit_code=EXIT_INTERRUPTED)

    def request_checkpoint(self) -> None:
        """Write a checkpoint after the step in work."""
        if self.state is JobState.RUNNING:
            self._group.request_checkpoint()

    def fail(self, error: DeepoptError) -> None:
        """End as failed because of something that no worker did."""
        if self.state not in ENDED:
            self._end_failed(error.message, remedy=error.remedy, exit_code=error.exit_code)

    def handle(self, event: HeadEvent) -> None:
        """Take one event; one of another generation is refused."""
        if self.state in ENDED:
            return
        generation = self.generation
        if isinstance(event, AgentGone):
            self._renew_agent(event.host, why="has ended")
            return
        if isinstance(event, AgentWord | ProcessEnded):
            if generation is not None:
                self._on_agent(generation, event)
            return
        if isinstance(event, WorkerUp | WorkerGone | ExportEnded | GroupRefused):
            if generation is None or event.generation != generation.number:
                return  # the group speaks of processes that the head itself has ended
            if isinstance(event, WorkerUp):
                member = generation.members[event.rank]
                member.pid, member.host = event.pid, event.host
                self._group.watch(event.rank)
            elif isinstance(event, WorkerGone):
                self._on_gone(generation, event)
            elif isinstance(event, ExportEnded):
                self._on_export(generation, event)
            else:
                self.fail(event.error)
            return
        if generation is None or not generation.owns(event.sender):
            self._refuse(event)
            return
        self._on_message(generation, event)

    def tick(self) -> None:
        """Look at the clock: deadlines, commits, the end."""
        now_s = self._clock.monotonic_s()
        gap_s, self._ticked_s = now_s - self._ticked_s, now_s
        generation = self.generation
        if self.state in ENDED or generation is None:
            return
        if gap_s > PAUSE_S:  # the head was paused; its workers are not to blame
            generation.liveness.forgive(gap_s)
            generation.began_s += gap_s
        self._take_commits(generation.committer.poll())
        if generation.settle_by_s is not None:
            settled = generation.is_accounted_for and now_s >= generation.not_before_s
            if settled or now_s >= generation.settle_by_s:
                self._settle(generation)
        elif self._stop_by_s is not None and now_s >= self._stop_by_s:
            self._warn(
                f"workers did not stop within {self._stop_key} ({self._stop_grace_s:g} s)"
            )
            self._end_stopped(reason="killed after the grace time")
        elif generation.has_ended:
            self._conclude(generation, now_s=now_s)
        else:
            self._look_for_losses(generation, now_s=now_s)
        if self.state not in ENDED:
            self._show()

    # --- generations ---------------------------------------------------------------------

    def _form(self, *, reason: str, before: Generation | None = None) -> None:
        """Form the next generation, of what lives on of the one before.

        It goes on from what its workers have; where that is not enough, from the newest verified
        checkpoint.
        """
        number, plan = self.next_generation, self.plan
        standings = {} if before is None else before.standings()
        self._group.prepare(
            number, num_workers=plan.world_size, kept={rank: rank for rank in standings}
        )
        self._store.sweep(number)
        start = self._find_start(standings)
        self._journal.append(
            "generation",
            generation=number,
            plan_id=plan.plan_id,
            start_step=start.step,
            checkpoint=start.checkpoint,
            source=start.source,
        )
        self._number = number
        self.generation = generation = open_generation(
            number,
            plan=plan,
            job=self.job,
            job_id=self.identity.job_id,
            skeleton_fingerprint=self.skeleton.fingerprint(),
            start=start,
            now_s=self._clock.monotonic_s(),
            incarnations=[
                before.members[rank].sender.incarnation
                if before is not None and rank in standings
                else self._new_incarnation()
                for rank in range(plan.world_size)
            ],
            make_committer=self._make_committer,
        )
        self._board.tell(
            events.GenerationFormed(
                generation=number,
                plan_id=plan.plan_id,
                num_workers=plan.world_size,
                start_step=start.step,
                checkpoint=start.checkpoint,
                reason=reason,
                source=start.source,
                kept=tuple(sorted(standings)),
            )
        )
        generation.liveness.be_patient(2.0**self._hangs)
        if (fault := self.faults.open) is not None:
            fault.start_step = start.step
            fault.source = start.source
        self._group.launch(
            make_assignments(
                generation,
                start=start,
                job=self.job,
                run_dir=str(self.run.root),
                store_address=self._store_address,
                last_step=self.identity.last_step,
            )
        )
        self._show(force=True)

    def _adopt(self, found: Mapping[int, Adopted], *, now_s: float) -> None:
        """Make the generation of the head before one's own, as its workers have it."""
        start_step = max(worker.start_step for worker in found.values())
        senders = {rank: worker.sender for rank, worker in found.items()}
        self.generation = generation = open_generation(
            self._number,
            plan=self.plan,
            job=self.job,
            job_id=self.identity.job_id,
            skeleton_fingerprint=self.skeleton.fingerprint(),
            start=Start(step=start_step, checkpoint=None, tokens_seen=None),
            now_s=now_s,
            incarnations=[
                sender.incarnation
                if (sender := senders.get(rank)) is not None
                else self._new_incarnation()
                for rank in range(self.plan.world_size)
            ],
            make_committer=self._make_committer,
        )
        generation.adopted = True
        for rank, worker in found.items():
            member, ready = generation.members[rank], worker.ready
            member.pid, member.host = worker.whereabouts.pid, worker.whereabouts.host
            member.ready = ready
            if ready is not None and ready.data_fingerprint is not None:
                self._data_fingerprint = ready.data_fingerprint
        generation.committer.data_fingerprint = self._data_fingerprint
        if (fault := self.faults.open) is not None:
            fault.ready_s, fault.start_step = now_s, self.progress.step
        self._move(JobState.RUNNING, reason="a new head goes on with the workers of the last")
        for rank in set(range(self.plan.world_size)) - set(found):
            failure = lost_worker(
                generation,
                rank,
                "death",
                "its process ended while there was no head",
                step_done=self.progress.step,
            )
            self._add_failure(generation, failure)

    def _recall(self) -> None:
        """What the figures on disk and the journal say of the progress under an earlier head."""
        history, progress = replay(self._journal.entries), self.progress
        progress.checkpoint_step = history.checkpoint_step
        progress.checkpoint_path = history.checkpoint_path
        for line in read_json_lines(self.run.metrics):
            step, tokens = int(line["step"]), self._tokens_seen.get(int(line["step"]) - 1)
            self._tokens_seen[step] = None if tokens is None else tokens + int(line["tokens"])
            progress.step = step

    def _find_start(self, standings: Mapping[int, Standing]) -> Start:
        """Where the next generation goes on: from what survivors have, else from a checkpoint."""
        restoration = restore(self.plan, survivors=standings)
        if restoration is None:
            return self._find_checkpoint()
        step, progress = restoration.step, self.progress
        due = is_checkpoint_due(step, job=self.job, last_step=self.identity.last_step)
        start = Start(
            step=step,
            checkpoint=progress.checkpoint_path,
            tokens_seen=self._tokens_seen.get(step),
            source=restoration.source,
            in_place=InPlace(
                previous_generation=self._number,
                transfers=restoration.transfers,
                report=step > progress.step,
                save=due and step != progress.checkpoint_step,
            ),
        )
        progress.step = step
        return start

    def _find_checkpoint(self) -> Start:
        """The newest verified checkpoint; those that were passed over are named."""
        found = self._store.newest_verified(self.skeleton.fingerprint())
        for rejected in () if found is None else found.rejected:
            folder = folders.parse(rejected.path)
            self._board.tell(
                events.CheckpointWasNotWritten(
                    step=0 if folder is None else folder.step, reason=rejected.reason
                )
            )
        start = choose_start(found, plan=self.plan, last_step=self.identity.last_step)
        self.progress.step = self.progress.checkpoint_step = start.step
        self.progress.checkpoint_path = start.checkpoint
        self._tokens_seen = {start.step: start.tokens_seen}
        self._data_fingerprint = start.data_fingerprint or self._data_fingerprint
        return start

    def _look_for_losses(self, generation: Generation, *, now_s: float) -> None:
        late = find_late_start(
            generation, now_s=now_s, timeout_s=self.job.faults.setup_timeout_s
        )
        if late is not None:
            self._fence(
                generation,
                Finding(
                    rank=late.rank,
                    kind="silent",
                    cause=Cause.SETUP,
                    message=late.message,
                    since_s=generation.began_s,
                ),
            )
            return
        for host in generation.liveness.silent_agents(now_s=now_s):
            self._renew_agent(host, why=f"has been silent for {AGENT_RENEW_S:g} s")
        for finding in generation.liveness.check(now_s=now_s, stepping=generation.is_ready):
            if finding.kind in ("suspect", "held"):
                self._warn(f"rank {finding.rank} is {finding.kind}: {finding.message}")
                self._show(force=True)
            else:
                self._hangs += finding.kind == "stuck"
                self._fence(generation, finding)

    def _fence(self, generation: Generation, finding: Finding) -> None:
        """Give a worker up, and kill its process, so that it cannot come back."""
        self._add_failure(
            generation,
            lost_worker(
                generation,
                finding.rank,
                "hang",
                finding.message,
                step_done=self.progress.step,
                cause=str(finding.cause),
            ),
            since_s=finding.since_s,
        )
        self._group.kill(finding.rank)

    def _make_committer(self, origin: Origin) -> Committer:
        return Committer(
            self._store,
            executor=self._executor,
            origin=origin,
            tokens_seen=self._tokens_seen.get,
        )

    def _add_failure(
        self, generation: Generation, failure: Failure, *, since_s: float | None = None
    ) -> None:
        """Take note that a worker is lost.

        Args:
            generation: its group.
            failure: why.
            since_s: its last good sign; None: its last heartbeat.
        """
        member = generation.members[failure.sender.rank]
        if member.failure is not None:
            return  # its first word counts
        member.failure = failure
        now_s = self._clock.monotonic_s()
        if since_s is None:
            age_s = generation.liveness.age_s(failure.sender.rank, now_s=now_s)
            since_s = now_s - (age_s or 0.0)
        fault = self.faults.notice(
            generation=generation.number,
            step_done=self.progress.step,
            since_s=since_s,
            now_s=now_s,
            plan=self.plan,
        )
        member.pid = member.pid or failure.pid
        member.host = member.host or failure.host
        generation.failures.append(failure)
        generation.liveness.release(failure.sender.rank)
        self._board.tell(
            events.WorkerLost(
                rank=failure.sender.rank,
                generation=generation.number,
                pid=failure.pid,
                host=failure.host,
                step=failure.step,
                action=failure.action,
                failure=failure.kind,
                message=failure.message,
            )
        )
        if not generation.interrupted:  # who waits for it may have noticed nothing yet
            generation.interrupted = True
            self._group.interrupt()
        # The verdict waits for the others: it finds the culprit, and keeps who lives on.
        own = failure.kind in recovery.OWN_ERROR_KINDS
        grace_s = OWN_GRACE_S if own else self.job.faults.survivor_timeout_s
        generation.not_before_s = max(
            generation.not_before_s,
            fault.noticed_s + backoff_s(self._spent, step_done=self.progress.step),
        )
        due_s = max(now_s + grace_s, generation.not_before_s)
        settle_by_s = generation.settle_by_s
        generation.settle_by_s = due_s if settle_by_s is None else min(due_s, settle_by_s)
        self._show(force=len(generation.failures) == 1)  # a thousand follow in a large group

    def _settle(self, generation: Generation) -> None:
        """The failures are in: find the culprit, end the generation, form the next or fail."""
        now_s = self._clock.monotonic_s()
        for rank in generation.liveness.suspects():  # its peers' errors are the second sign
            silence_s = generation.liveness.age_s(rank, now_s=now_s)
            cause, seen = generation.liveness.explain(rank, now_s=now_s)
            message = f"no heartbeat for {silence_s:.1f} s when its peers failed"
            failure = lost_worker(
                generation,
                rank,
                "hang",
                message + (f"; {seen}" if seen else ""),
                step_done=self.progress.step,
                cause=str(cause),
            )
            self._add_failure(generation, failure)
        verdict = recovery.decide(
            generation.failures,
            spent=self._spent,
            limits=self._limits,
            now_s=now_s,
            step_done=self.progress.step,
            stopping=self.state is JobState.STOPPING,
            preempted=frozenset(m.sender.rank for m in generation.members if m.preempted),
        )
        self._judge(verdict)
        if isinstance(verdict, recovery.Fail):
            self._end_failed(
                verdict.message,
                remedy=verdict.remedy,
                exit_code=verdict.exit_code,
                blame=verdict.blame,
            )
            return
        culprit = verdict.blame.culprit
        why = f"rank {culprit.sender.rank}: {culprit.message}"
        if isinstance(verdict, recovery.StopAnyway):
            self._warn(f"a worker was lost while stopping: {why}")
            self._end_stopped(reason="asked to stop")
            return
        for member in generation.members:
            if member.failure is None and member.ended is None:
                timeout_s = self.job.faults.survivor_timeout_s
                self._warn(
                    f"rank {member.sender.rank} did not leave its group within "
                    f"faults.survivor_timeout_s ({timeout_s:g} s) and is replaced as well"
                )
        self.progress.restarts += 1
        if self.state is not JobState.RECOVERING:
            self._move(JobState.RECOVERING, reason=why)
        self._group.kill_all(timeout_s=KILL_TIMEOUT_S, but=generation.standings().keys())
        if (fault := self.faults.open) is not None:
            fault.fenced_s = self._clock.monotonic_s()
        self._take_commits(generation.committer.drain(timeout_s=self._drain_timeout_s))
        self._form(reason=why, before=generation)

    def _judge(self, verdict: recovery.Verdict) -> None:
        """Write down whose fault it was and what is done about it, before it is done."""
        fault = self.faults.open
        if fault is None:
            return
        fault.blame, fault.decided_s = verdict.blame, self._clock.monotonic_s()
        fault.cause = recovery.cause_of(verdict.blame.culprit)
        if isinstance(verdict, recovery.Restart):
            fault.budget = str(verdict.budget)
            fault.next = (
                f"generation {self.next_generation} begins; {verdict.left} more "
                f"{verdict.budget} fault(s) allowed within {self._limits.window_s:g} s"
            )
            self._spent.append(
                Spent(
                    budget=verdict.budget,
                    at_s=fault.decided_s,
                    step_done=fault.step_done,
                    host=verdict.blame.culprit.host,
                )
            )
            if verdict.bad_hosts:
                self._warn(
                    f"host(s) with {self._limits.bad_host_after} faults or more: "
                    f"{', '.join(verdict.bad_hosts)}; look at them, or leave them out of the hostfile"
                )
        elif isinstance(verdict, recovery.Fail):
            fault.next = "the job ends as failed"
        else:
            fault.next = "the job ends as asked"
        told = fault.to_json(self.plan)
        self._note("fault", fault=told)
        self._board.tell(events.FaultJudged(fault=told))

    def _close_fault(self, outcome: str) -> None:
        is_judged = self.faults.open is not None and self.faults.open.is_judged
        closed = self.faults.close(outcome, plan=self.plan)
        if closed is not None and is_judged:
            self._note("recovered", fault=closed)
            self._board.tell(events.FaultOver(fault=closed))

    # --- messages ------------------------------------------------------------------------

    def _on_agent(self, generation: Generation, event: AgentWord | ProcessEnded) -> None:
        """Take what a host's agent says of the workers there."""
        if isinstance(event, ProcessEnded):
            rank = generation.rank_of(event.pid, host=event.host)
            if rank is not None:
                generation.note_exit(rank, event.how)
                self._group.confirm_exit(rank, how=event.how)
            return
        ranks = {
            pid: rank
            for pid in event.looks
            if (rank := generation.rank_of(pid, host=event.host)) is not None
        }
        generation.liveness.see(
            event.host,
            looks={rank: event.looks[pid] for pid, rank in ranks.items()},
            now_s=self._clock.monotonic_s(),
        )

    def _renew_agent(self, host: str, *, why: str) -> None:
        """Start another agent on a host: without one, no second sign comes from there."""
        self._warn(f"the agent on {host} {why}: another one is started")
        self._group.renew_agent(host)

    def _on_message(self, generation: Generation, message: WorkerMessage) -> None:
        now_s = self._clock.monotonic_s()
        rank = message.sender.rank
        if isinstance(message, Heartbeat):
            generation.liveness.hear(message, now_s=now_s)
        elif isinstance(message, StepReport):
            self._on_step(generation, message)
        elif isinstance(message, ShardsWritten):
            if not (generation.adopted and message.step <= self.progress.checkpoint_step):
                generation.committer.written(message)
        elif isinstance(message, CheckpointFailed):
            generation.committer.failed(message)
        elif isinstance(message, WorkerReady):
            self._on_ready(generation, message)
        elif isinstance(message, ExpertLoads):
            self._on_expert_loads(message)
        elif isinstance(message, WeightWork):
            self._board.tell(
                events.WeightWorkChosen(
                    rank=rank, generation=generation.number, notes=message.notes
                )
            )
        elif isinstance(message, Preempted):
            self._on_preempted(generation, message)
        elif isinstance(message, BadStep):
            self._board.tell(
                events.NumbersWereBad(
                    step=message.step, what=message.what, skipped=message.skipped
                )
            )
        elif isinstance(message, RunEnded):
            generation.members[rank].ended = message
            generation.liveness.release(rank)
            if generation.has_ended:
                generation.ended_s = now_s
        else:
            self._add_failure(generation, message)

    def _on_preempted(self, generation: Generation, message: Preempted) -> None:
        """A worker will soon be taken away: stop, or save and go on without it."""
        member = generation.members[message.sender.rank]
        if member.preempted:
            return
        member.preempted = True
        who = f"rank {message.sender.rank} on {member.host}"
        if self.job.faults.on_preemption == "stop":
            self.request_stop(preempted=who)
        else:
            self._warn(f"{who} got SIGTERM; the job goes on without it")
            self.request_checkpoint()

    def _on_ready(self, generation: Generation, message: WorkerReady) -> None:
        member = generation.members[message.sender.rank]
        member.ready, member.pid, member.host = message, message.pid, message.host
        self._board.tell(
            events.WorkerBecameReady(
                rank=message.sender.rank,
                generation=generation.number,
                pid=message.pid,
                host=message.host,
                stages=message.stages,
                device=message.device,
                setup_s=message.setup_s,
            )
        )
        if not self._has_the_data(generation, message):
            return
        starting = self.state in (JobState.STARTING, JobState.RECOVERING)
        if generation.is_ready and starting and not generation.failures:
            now_s = self._clock.monotonic_s()
            generation.liveness.begin_steps(now_s=now_s)
            if (fault := self.faults.open) is not None:
                fault.ready_s = now_s
                fault.restore_s = max(
                    m.ready.setup_s.get("load", 0.0) for m in generation.members if m.ready
                )
            self._move(JobState.RUNNING)
            self._group.keep_spares(self.job.faults.spares)

    def _has_the_data(self, generation: Generation, message: WorkerReady) -> bool:
        """Whether a worker reads the data that the others and the checkpoint know; else fail."""
        found, known = message.data_fingerprint, self._data_fingerprint
        if found is None:
            return True
        if known is not None and found != known:
            self._end_failed(
                f"rank {message.sender.rank} on {message.host} reads other data than the job "
                f"began with: fingerprint {found}, expected {known}",
                remedy="give all hosts the same files (the default text is that of their Python "
                "version), or start a new run for new data",
                exit_code=InputError.exit_code,
            )
            return False
        self._data_fingerprint = generation.committer.data_fingerprint = found
        return True

    def _on_step(self, generation: Generation, report: StepReport) -> None:
        progress = self.progress
        if generation.adopted and report.step <= progress.step:
            return  # told to the head before
        figures = figures_of(
            report,
            forward_flops_per_token=self.skeleton.forward_flops_per_token,
            peak_flops=generation.peak_flops(),
        )
        before = self._tokens_seen.get(report.step - 1)
        self._tokens_seen[report.step] = None if before is None else before + report.tokens
        self.pace.add(report, figures)
        progress.step, progress.report, progress.figures = report.step, report, figures
        progress.prediction_error = prediction_error(self.prediction, self.pace.step_s)
        progress.time_left_s = self.pace.time_left_s(self.identity.last_step - report.step)
        generation.liveness.note_step(report.step_time_s)
        fault = self.faults.open
        if fault is not None and fault.ready_s is not None and report.step > fault.step_done:
            fault.done_s = self._clock.monotonic_s()
            self._close_fault("recovered")
        self._board.step(report.step, metrics_line(report, figures, time=utc_now()))

    def _on_expert_loads(self, message: ExpertLoads) -> None:
        for layer, loads in message.loads:
            self.load_forecast.add(
                layer, loads, first_step=message.first_step, step=message.step
            )
        self._board.expert_loads(
            {
                "first_step": message.first_step,
                "step": message.step,
                "loads": dict(message.loads),
                "forecast_error": self.load_forecast.errors(),
            }
        )

    def _on_gone(self, generation: Generation, event: WorkerGone) -> None:
        member = generation.members[event.rank]
        if member.ended is not None and not (generation.exporting and event.rank == 0):
            return  # its work is done
        failure = lost_worker(
            generation,
            event.rank,
            "death",
            event.reason,
            step_done=self.progress.step,
            traceback=event.traceback,
        )
        self._add_failure(generation, failure)

    def _refuse(self, message: WorkerMessage) -> None:
        sender, name = message.sender, type(message).__name__
        if (sender.incarnation, name) in self._refused:
            return  # said once; a zombie may go on for long
        self._refused.add((sender.incarnation, name))
        self._board.tell(
            events.MessageRefused(
                rank=sender.rank,
                generation=sender.generation,
                current_generation=self._number,
                message=name,
            )
        )

    def _take_commits(self, outcomes: list[Committed | NotCommitted]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, NotCommitted):
                self._board.tell(
                    events.CheckpointWasNotWritten(
                        step=outcome.step, reason=outcome.reason, rank=outcome.rank
                    )
                )
                continue
            self._note("checkpoint", step=outcome.step, path=str(outcome.path))
            self._board.tell(
                events.CheckpointCommitted(
                    step=outcome.step, path=str(outcome.path), size_bytes=outcome.size_bytes
                )
            )
            if outcome.warning:
                self._warn(outcome.warning)
            self.progress.checkpoint_step = outcome.step
            self.progress.checkpoint_path = str(outcome.path)

    # --- the end -------------------------------------------------------------------------

    @property
    def _drain_timeout_s(self) -> float:
        return self.job.checkpoint.timeout_s

    def _conclude(self, generation: Generation, *, now_s: float) -> None:
        """All runs have ended: wait for the checkpoint, then the final weights, then end."""
        assert generation.ended_s is not None, "a generation that has ended knows when"
        if generation.exporting:
            if now_s - generation.ended_s > self.job.faults.step_timeout_s:
                self._fence(
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
        if generation.committer.busy and now_s - generation.ended_s < self._drain_timeout_s:
            return
        step = min(member.ended.step for member in generation.members if member.ended)
        progress = self.progress
        if step < self.identity.last_step:
            if progress.checkpoint_step != step:
                self._warn(f"step {step} is in no checkpoint: a resume repeats steps")
            self._end_stopped(reason="asked to stop")
        elif generation.adopted and progress.checkpoint_step != step:
            # Its shards were told to the head before: they are written once more.
            self._move(
                JobState.RECOVERING, reason="the last checkpoint went with the last head"
            )
            self._form(reason="the last checkpoint is written again", before=generation)
        elif self.job.evaluation.alone:
            self._end(JobState.FINISHED, exit_code=0)
        elif progress.checkpoint_step != step or progress.checkpoint_path is None:
            newest = progress.checkpoint_step
            self._end_failed(
                f"the last step, {step}, is done, but its checkpoint could not be written; the "
                f"newest whole one is of step {newest}",
                remedy="see `checkpoint_failed` in events.jsonl, make room, `deepopt resume`",
                exit_code=CheckpointError.exit_code,
            )
        else:
            generation.exporting = True
            generation.ended_s = now_s
            self._group.export(0, checkpoint=progress.checkpoint_path)

    def _on_export(self, generation: Generation, event: ExportEnded) -> None:
        if not generation.exporting:
            return
        if event.folder is None:
            self._end_failed(
                f"all steps are done, but the final weights could not be written: "
                f"{event.reason}",
                remedy="make room, then `deepopt resume`: it writes them from the checkpoint",
                exit_code=CheckpointError.exit_code,
            )
        else:
            self._end(JobState.FINISHED, exit_code=0)

    def _end_stopped(self, *, reason: str, exit_code: int = 0) -> None:
        self._end(JobState.STOPPED, exit_code=exit_code, reason=reason)

    def _end_failed(
        self,
        message: str,
        *,
        remedy: str,
        exit_code: int,
        blame: recovery.Blame | None = None,
    ) -> None:
        self._error = error_of(message, remedy=remedy, blame=blame, plan=self.plan)
        self._board.tell(events.Failed(message=message, remedy=remedy, exit_code=exit_code))
        self._end(JobState.FAILED, exit_code=exit_code, reason=message)

    def _end(self, state: JobState, *, exit_code: int, reason: str = "") -> None:
        previous, self.state = self.state, advance(self.state, state)
        self._note("state", state=str(state), exit_code=exit_code)
        self._close_fault("recovered" if state is JobState.FINISHED else str(state))
        try:
            self._group.kill_all(timeout_s=KILL_TIMEOUT_S)
        except DeepoptError as error:  # the supervisor takes the whole cluster down
            self._warn(error.message)
        if self.generation is not None:
            committer = self.generation.committer
            self._take_commits(committer.drain(timeout_s=self._drain_timeout_s))
        self.outcome = Outcome(state=state, exit_code=exit_code)
        self._report()
        self._announce(previous, reason=reason)

    def _report(self) -> None:
        if self._make_report is None:
            return
        try:
            self._board.report(self._make_report(self))
        except Exception as error:  # noqa: BLE001 - it must not keep the end from being told
            self._warn(f"no closing report: {type(error).__name__}: {error}")

    # --- journal and board ---------------------------------------------------------------

    def _move(self, state: JobState, *, reason: str = "") -> None:
        previous, self.state = self.state, advance(self.state, state)
        self._note("state", state=str(state))
        self._announce(previous, reason=reason)

    def _announce(self, previous: JobState, *, reason: str) -> None:
        self._board.tell(
            events.StateChanged(state=str(self.state), previous=str(previous), reason=reason)
        )
        self._show(force=True)

    def _note(self, kind: str, **fields: Any) -> None:
        """Journal what a resume can do without: a full disk does not stop training."""
        try:
            self._journal.append(kind, **fields)
        except DeepoptError as error:
            self._warn(error.message)

    def _warn(self, message: str) -> None:
        self._board.tell(events.Warned(message=message))

    def _show(self, *, force: bool = False) -> None:
        now_s = self._clock.monotonic_s()

        def status() -> dict[str, Any]:
            return status_of(
                self.identity,
                state=self.state,
                plan=self.plan,
                progress=self.progress,
                generation=self.generation,
                exit_code=None if self.outcome is None else self.outcome.exit_code,
                error=self._error,
                faults=self.faults.to_json(self.plan),
                now_s=now_s,
                warm_spares=self._group.warm_spares,
            )

        self._board.show(status, now_s=now_s, force=force)
