"""What workers and agents say, given to the part of the head that it concerns."""

from __future__ import annotations

import socket

from deepopt.cluster.group import WorkerGone, WorkerMessage
from deepopt.cluster.node_agent import AgentWord, ProcessEnded
from deepopt.errors import InputError
from deepopt.head.account import Account
from deepopt.head.ending import Ending
from deepopt.head.generation import Generation, lost_worker
from deepopt.head.losses import Losses
from deepopt.head.record import JobRecord
from deepopt.head.shrinking import Shrinking
from deepopt.head.state import JobState
from deepopt.head.stopping import Stopping
from deepopt.telemetry import events
from deepopt.worker.messages import (
    BadStep,
    CheckpointFailed,
    ExpertLoads,
    Heartbeat,
    Preempted,
    RunEnded,
    ShardsWritten,
    StepReport,
    WeightWork,
    WorkerReady,
)


class Hearing:
    """Takes messages.

    Args:
        record: of the job.
        account: of what has been done.
        losses: takes note of lost workers.
        shrinking: does with fewer workers.
        ending: ends the job.
        stopping: takes requests to stop.
    """

    def __init__(
        self,
        record: JobRecord,
        *,
        account: Account,
        losses: Losses,
        shrinking: Shrinking,
        ending: Ending,
        stopping: Stopping,
    ) -> None:
        self._record = record
        self._account = account
        self._losses = losses
        self._shrinking = shrinking
        self._ending = ending
        self._stopping = stopping
        self._refused: set[tuple[str, str]] = set()

    def take_agent(self, generation: Generation, event: AgentWord | ProcessEnded) -> None:
        """Take what a host's agent says of the workers there."""
        if isinstance(event, ProcessEnded):
            at_s, fault = self._moment_of(event), self._record.faults.open
            rank = generation.rank_of(event.pid, host=event.host)
            if rank is not None:
                generation.note_exit(rank, event.how, at_s=at_s)
                self._record.group.confirm_exit(rank, how=event.how)
                failure = generation.members[rank].failure
                if fault is not None and failure is not None and failure.kind == "death":
                    fault.since_s = min(fault.since_s, at_s)  # told of by Ray before
            else:  # Ray's word came first, and recovery did not wait for this one
                told = self._record.faults.name_exit(
                    event.pid, host=event.host, words=event.how, at_s=at_s
                )
                if told is not None:
                    self._record.note("recovered", fault=told)
                    self._record.show(force=True)
            return
        ranks = {
            pid: rank
            for pid in event.looks
            if (rank := generation.rank_of(pid, host=event.host)) is not None
        }
        generation.liveness.see(
            event.host,
            looks={rank: event.looks[pid] for pid, rank in ranks.items()},
            now_s=self._record.clock.monotonic_s(),
        )

    def _moment_of(self, event: ProcessEnded) -> float:
        """When an agent saw a process end, on the head's clock: it has one with agents of its host."""
        now_s = self._record.clock.monotonic_s()
        if event.at_s is None or event.host != socket.gethostname():
            return now_s
        return min(event.at_s, now_s)

    def take(self, generation: Generation, message: WorkerMessage) -> None:
        """Take what a worker of the generation says."""
        now_s = self._record.clock.monotonic_s()
        rank = message.sender.rank
        if isinstance(message, Heartbeat):
            generation.liveness.hear(message, now_s=now_s)
        elif isinstance(message, StepReport):
            self._account.take_step(generation, message)
        elif isinstance(message, ShardsWritten):
            if not (
                generation.adopted and message.step <= self._record.progress.checkpoint_step
            ):
                generation.committer.written(message)
        elif isinstance(message, CheckpointFailed):
            generation.committer.failed(message)
        elif isinstance(message, WorkerReady):
            self._on_ready(generation, message)
        elif isinstance(message, ExpertLoads):
            self._account.take_expert_loads(message)
        elif isinstance(message, WeightWork):
            self._record.learn_ways(message)
            if message.notes:
                self._record.board.tell(
                    events.WeightWorkChosen(
                        rank=rank, generation=generation.number, notes=message.notes
                    )
                )
        elif isinstance(message, Preempted):
            self._on_preempted(generation, message)
        elif isinstance(message, BadStep):
            self._record.board.tell(
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
            self._losses.add(generation, message)

    def _on_preempted(self, generation: Generation, message: Preempted) -> None:
        """A worker will soon be taken away: stop, or save and go on without it."""
        member = generation.members[message.sender.rank]
        if member.preempted:
            return
        member.preempted = True
        who = f"rank {message.sender.rank} on {member.host}"
        if self._record.job.faults.on_preemption == "stop":
            self._stopping.request(preempted=who)
        else:
            self._record.warn(f"{who} got SIGTERM; the job goes on without it")
            self._record.group.request_checkpoint()

    def _on_ready(self, generation: Generation, message: WorkerReady) -> None:
        member = generation.members[message.sender.rank]
        member.ready, member.pid, member.host = message, message.pid, message.host
        self._record.board.tell(
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
        stopping = self._record.state is JobState.STOPPING and generation.ready_s is None
        starting = self._record.state in (JobState.STARTING, JobState.RECOVERING)
        if generation.is_ready and (starting or stopping) and not generation.failures:
            now_s = generation.ready_s = self._record.clock.monotonic_s()
            generation.liveness.begin_steps(now_s=now_s)
            if (fault := self._record.faults.open) is not None:
                fault.ready_s = now_s
                fault.restore_s = max(
                    m.ready.setup_s.get("load", 0.0) for m in generation.members if m.ready
                )
            if starting:
                self._record.move(JobState.RUNNING)
            else:  # its workers' processes may be new ones
                self._record.group.request_stop()

    def _has_the_data(self, generation: Generation, message: WorkerReady) -> bool:
        """Whether a worker reads the data that the others and the checkpoint know; else fail."""
        found, known = message.data_fingerprint, self._record.data_fingerprint
        if found is None:
            return True
        if known is not None and found != known:
            self._ending.failed(
                f"rank {message.sender.rank} on {message.host} reads other data than the job "
                f"began with: fingerprint {found}, expected {known}",
                remedy="give all hosts the same files (the default text is that of their Python "
                "version), or start a new run for new data",
                exit_code=InputError.exit_code,
            )
            return False
        self._record.data_fingerprint = generation.committer.data_fingerprint = found
        return True

    def take_gone(self, generation: Generation, event: WorkerGone) -> None:
        """Take the word that a worker's process is gone."""
        member = generation.members[event.rank]
        if member.ended is not None and not (generation.exporting and event.rank == 0):
            return  # its work is done
        if event.no_place and self._shrinking.takes(generation, event.rank):
            return
        failure = lost_worker(
            generation,
            event.rank,
            "death",
            event.reason,
            step_done=self._record.progress.step,
            traceback=event.traceback,
        )
        self._losses.add(generation, failure)

    def refuse(self, message: WorkerMessage) -> None:
        """Turn away who is not of this generation."""
        sender, name = message.sender, type(message).__name__
        if (sender.incarnation, name) in self._refused:
            return  # said once; a zombie may go on for long
        self._refused.add((sender.incarnation, name))
        self._record.board.tell(
            events.MessageRefused(
                rank=sender.rank,
                generation=sender.generation,
                current_generation=self._record.number,
                message=name,
            )
        )
