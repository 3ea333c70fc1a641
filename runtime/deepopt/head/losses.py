"""Lost workers: finds them, has them killed, takes the verdict and acts on it.

The verdicts are those of `liveness` and `recovery`.
"""

from __future__ import annotations

from dataclasses import replace

from deepopt.head import recovery
from deepopt.head.account import Account
from deepopt.head.budgets import Spent, backoff_s
from deepopt.head.ending import KILL_TIMEOUT_S, Ending
from deepopt.head.former import Former
from deepopt.head.generation import Generation, find_late_start, lost_worker
from deepopt.head.liveness import AGENT_RENEW_S, Cause, Finding
from deepopt.head.record import JobRecord
from deepopt.head.shrinking import Shrinking
from deepopt.head.state import JobState
from deepopt.telemetry import events
from deepopt.worker.messages import Failure

# Ray tells of a process's end, its host's agent of the signal as well, and either may be first. A job
# that ends because of it waits so long for the agent's word; one that goes on takes it when it comes.
AGENT_WORD_S = 0.3
# After a worker's own error no group is formed; others may still have a word to add.
OWN_GRACE_S = 0.5


class Losses:
    """Takes note of lost workers until their generation's failures are in, then acts.

    Args:
        record: of the job.
        account: takes the last checkpoints of a generation.
        former: forms the next generation.
        shrinking: does with fewer workers.
        ending: ends the job.
    """

    def __init__(
        self,
        record: JobRecord,
        *,
        account: Account,
        former: Former,
        shrinking: Shrinking,
        ending: Ending,
    ) -> None:
        self._record = record
        self._account = account
        self._former = former
        self._shrinking = shrinking
        self._ending = ending
        self._named_hosts: set[str] = set()  # that people were told to look at

    def look(self, generation: Generation, *, now_s: float) -> None:
        """Look for workers that are late, silent or stuck."""
        if self._shrinking.begins(generation, now_s=now_s):
            return
        late = find_late_start(
            generation, now_s=now_s, timeout_s=self._record.job.faults.setup_timeout_s
        )
        if late is not None:
            self.fence(
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
            self.renew_agent(host, why=f"has been silent for {AGENT_RENEW_S:g} s")
        for finding in generation.liveness.check(now_s=now_s, stepping=generation.is_ready):
            if finding.kind in ("suspect", "held"):
                self._record.warn(f"rank {finding.rank} is {finding.kind}: {finding.message}")
                self._record.show(force=True)
                continue
            if finding.kind == "stuck":
                self._former.hangs *= not generation.liveness.is_undisturbed
                self._former.hangs += 1
            if finding.cause is Cause.COLLECTIVE:
                self._call_off(generation, finding)
            else:
                self.fence(generation, finding)

    def is_due(self, generation: Generation, *, now_s: float) -> bool:
        """Whether no further word can come of a group that has lost a worker."""
        assert generation.settle_by_s is not None, "a group that has lost nobody"
        missing = [
            m.sender.rank
            for m in generation.members
            if not (m.failure or m.ended or m.sender.rank in generation.unplaced)
        ]
        hang = all(
            generation.liveness.stays(rank, told_s=generation.interrupted_s, now_s=now_s)
            for rank in missing
        )
        return now_s >= generation.settle_by_s or (hang and now_s >= generation.not_before_s)

    def _call_off(self, generation: Generation, finding: Finding) -> None:
        """End a group in which all wait: who does not leave it is the one they wait for."""
        now_s = self._record.clock.monotonic_s()
        self._record.faults.notice(
            generation=generation.number,
            step_done=self._record.progress.step,
            since_s=finding.since_s,
            now_s=now_s,
            plan=self._record.plan,
        )
        self._record.warn(
            f"all wait for each other; rank {finding.rank}: {finding.message}; all are told to leave"
        )
        generation.called_off = finding
        generation.settle_by_s = now_s + self._record.job.faults.survivor_timeout_s
        self._interrupt(generation, now_s=now_s)

    def _interrupt(self, generation: Generation, *, now_s: float) -> None:
        if not generation.interrupted:
            generation.interrupted, generation.interrupted_s = True, now_s
            self._record.group.interrupt()

    def _name_who_hangs(self, generation: Generation, *, finding: Finding) -> None:
        """Of a group that was called off: who stayed in it; else the network, or a lost message."""
        stayed = [m.sender.rank for m in generation.members if not (m.failure or m.ended)]
        for rank in stayed:
            peers = "" if rank == finding.rank else f"rank {finding.rank} waited: "
            failure = lost_worker(
                generation,
                rank,
                "hang",
                f"{peers}{finding.message}; it did not leave its group when told to",
                step_done=self._record.progress.step,
                cause=str(Cause.STUCK),
            )
            self.add(generation, failure, since_s=finding.since_s)
        if not stayed and {failure.kind for failure in generation.failures} == {"peer"}:
            first = generation.failures[0]
            blamed = replace(
                first,
                message=f"{finding.message}; all left their group when told to",
                cause=str(Cause.COLLECTIVE),
            )
            generation.failures[0] = generation.members[first.sender.rank].failure = blamed

    def renew_agent(self, host: str, *, why: str) -> None:
        """Start another agent on a host: without one, no second sign comes from there."""
        self._record.warn(f"the agent on {host} {why}: another one is started")
        self._record.group.renew_agent(host)

    def fence(self, generation: Generation, finding: Finding) -> None:
        """Give a worker up, and kill its process, so that it cannot come back."""
        self.add(
            generation,
            lost_worker(
                generation,
                finding.rank,
                "hang",
                finding.message,
                step_done=self._record.progress.step,
                cause=str(finding.cause),
            ),
            since_s=finding.since_s,
        )
        self._record.group.kill(finding.rank)

    def add(
        self, generation: Generation, failure: Failure, *, since_s: float | None = None
    ) -> None:
        """Take note that a worker is lost.

        Args:
            generation: its group.
            failure: why.
            since_s: the last good sign of one that was silent or stuck; None: its word is the first sign,
                or the end of its process.
        """
        member = generation.members[failure.sender.rank]
        if member.failure is not None:
            return  # its first word counts
        member.failure = failure
        if generation.unplaced and failure.kind == "peer":  # it leaves as it was asked to
            generation.failures.append(failure)
            generation.liveness.release(failure.sender.rank)
            return
        now_s = self._record.clock.monotonic_s()
        if failure.kind == "device":
            self._record.lose_device(self._record.places[failure.sender.rank])
        if since_s is None:
            since_s = now_s if member.gone_s is None else member.gone_s
        fault = self._record.faults.notice(
            generation=generation.number,
            step_done=self._record.progress.step,
            since_s=since_s,
            now_s=now_s,
            plan=self._record.plan,
        )
        member.pid = member.pid or failure.pid
        member.host = member.host or failure.host
        generation.failures.append(failure)
        generation.liveness.release(failure.sender.rank)
        self._record.board.tell(
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
        self._interrupt(
            generation, now_s=now_s
        )  # who waits for it may have noticed nothing yet
        # The verdict waits for the others: it finds the culprit, and keeps who lives on.
        own = failure.kind in recovery.OWN_ERROR_KINDS
        grace_s = OWN_GRACE_S if own else self._record.job.faults.survivor_timeout_s
        generation.not_before_s = max(
            generation.not_before_s,
            fault.noticed_s
            + backoff_s(self._record.spent, step_done=self._record.progress.step),
        )
        due_s = max(now_s + grace_s, generation.not_before_s)
        settle_by_s = generation.settle_by_s
        generation.settle_by_s = due_s if settle_by_s is None else min(due_s, settle_by_s)
        self._record.show(
            force=len(generation.failures) == 1
        )  # a thousand follow in a large group

    def settle(self, generation: Generation) -> None:
        """The failures are in: find the culprit, end the generation, form the next or fail."""
        now_s = self._record.clock.monotonic_s()
        if self._shrinking.is_all(generation):
            self._shrinking.finish(generation)
            return
        for rank in generation.liveness.suspects():  # its peers' errors are the second sign
            silence_s = generation.liveness.age_s(rank, now_s=now_s)
            cause, seen = generation.liveness.explain(rank, now_s=now_s)
            message = f"no heartbeat for {silence_s:.1f} s when its peers failed"
            failure = lost_worker(
                generation,
                rank,
                "hang",
                message + (f"; {seen}" if seen else ""),
                step_done=self._record.progress.step,
                cause=str(cause),
            )
            self.add(generation, failure, since_s=now_s - (silence_s or 0.0))
        if generation.called_off is not None:
            self._name_who_hangs(generation, finding=generation.called_off)
            if not generation.failures:  # it came to its end meanwhile
                generation.settle_by_s = self._record.faults.open = None
                return
        leaves_out = self._shrinking.can_leave_out(generation)
        never_ran = self._record.state is JobState.STARTING
        verdict = recovery.decide(
            generation.failures,
            spent=self._record.spent,
            limits=self._record.limits,
            now_s=now_s,
            step_done=self._record.progress.step,
            stopping=self._record.state is JobState.STOPPING,
            preempted=frozenset(m.sender.rank for m in generation.members if m.preempted),
            needs_device=never_ran
            or (self._shrinking.has_bad_places(generation) and not leaves_out),
        )
        if isinstance(verdict, recovery.Fail) and self._awaits_agent(generation, now_s=now_s):
            return
        self._judge(verdict)
        if isinstance(verdict, recovery.Fail):
            self._ending.failed(
                verdict.message,
                remedy=verdict.remedy,
                exit_code=verdict.exit_code,
                blame=verdict.blame,
            )
            return
        culprit = verdict.blame.culprit
        why = f"rank {culprit.sender.rank}: {culprit.message}"
        if isinstance(verdict, recovery.StopAnyway):
            self._record.warn(f"a worker was lost while stopping: {why}")
            self._ending.stopped(reason="asked to stop")
            return
        for member in generation.members:
            if member.failure is None and member.ended is None:
                stayed_s = now_s - generation.interrupted_s
                self._record.warn(
                    f"rank {member.sender.rank} has not left its group {stayed_s:.1f} s after it was "
                    "told to, and is replaced as well (faults.survivor_timeout_s "
                    f"{self._record.job.faults.survivor_timeout_s:g})"
                )
        self._record.progress.restarts += 1
        if self._record.state is not JobState.RECOVERING:
            self._record.move(JobState.RECOVERING, reason=why)
        self._record.group.kill_all(timeout_s=KILL_TIMEOUT_S, but=generation.standings().keys())
        if (fault := self._record.faults.open) is not None:
            fault.fenced_s = self._record.clock.monotonic_s()
        self._account.take_commits(
            generation.committer.drain(timeout_s=self._ending.drain_timeout_s)
        )
        if leaves_out:
            self._shrinking.leave_out(generation)
            return
        self._former.form(reason=why, before=generation)

    def _awaits_agent(self, generation: Generation, *, now_s: float) -> bool:
        """Whether an agent may still say how a process ended that Ray has told of."""
        fault = self._record.faults.open
        if fault is None or now_s - fault.noticed_s >= AGENT_WORD_S:
            return False
        return any(
            m.failure is not None
            and m.failure.kind == "death"
            and not (m.exit_words or m.failure.traceback)
            for m in generation.members
        )

    def _judge(self, verdict: recovery.Verdict) -> None:
        """Write down whose fault it was and what is done about it, before it is done."""
        fault = self._record.faults.open
        if fault is None:
            return
        fault.blame, fault.decided_s = verdict.blame, self._record.clock.monotonic_s()
        fault.cause = recovery.cause_of(verdict.blame.culprit)
        if isinstance(verdict, recovery.Restart):
            fault.budget = str(verdict.budget)
            fault.next = (
                f"generation {self._record.next_generation} begins; {verdict.left} more "
                f"{verdict.budget} fault(s) allowed within {self._record.limits.window_s:g} s"
            )
            self._record.spent.append(
                Spent(
                    budget=verdict.budget,
                    at_s=fault.decided_s,
                    step_done=fault.step_done,
                    host=verdict.blame.culprit.host,
                )
            )
            if new := [h for h in verdict.bad_hosts if h not in self._named_hosts]:
                self._named_hosts.update(new)
                self._record.warn(
                    f"host(s) with {self._record.limits.bad_host_after} faults or more: "
                    f"{', '.join(new)}; look at them, or leave them out of the hostfile"
                )
        elif isinstance(verdict, recovery.Fail):
            fault.next = "the job ends as failed"
        else:
            fault.next = "the job ends as asked"
        told = fault.to_json(self._record.plan)
        self._record.note("fault", fault=told)
        self._record.board.tell(events.FaultJudged(fault=told))
