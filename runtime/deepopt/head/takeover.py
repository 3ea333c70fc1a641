"""How a head takes over from one that has died: its workers have not stopped."""

from __future__ import annotations

from collections.abc import Mapping

from deepopt.head.account import Account
from deepopt.head.budgets import Budget, Spent
from deepopt.head.ending import KILL_TIMEOUT_S
from deepopt.head.formation import Start, open_generation
from deepopt.head.former import Former
from deepopt.head.generation import lost_worker
from deepopt.head.liveness import Cause
from deepopt.head.losses import Losses
from deepopt.head.record import JobRecord
from deepopt.head.state import JobState
from deepopt.telemetry import events
from deepopt.worker.adopted import Adopted


class Takeover:
    """Adopts what it finds, or forms a new worker group.

    Args:
        record: of the job.
        account: of what has been done.
        former: forms the next generation.
        losses: takes note of workers that died without a head.
    """

    def __init__(
        self, record: JobRecord, *, account: Account, former: Former, losses: Losses
    ) -> None:
        self._record = record
        self._account = account
        self._former = former
        self._losses = losses

    def begin(self, found: Mapping[int, Adopted], *, died_s: float, reason: str) -> None:
        """Go on with the worker group of a head that has died; its training has not stopped.

        Args:
            found: what the workers that live are doing, by rank.
            died_s: when the head died, on this machine's monotonic clock.
            reason: what is known of its end.

        Raises:
            DeepoptError: the journal cannot be written, or no checkpoint can be used.
        """
        self._record.journal.append("head", found=sorted(found), reason=reason)
        self._record.progress.restarts = len(self._record.spent)
        self._record.recall_size()
        self._former.adopted()
        self._account.recall()
        for worker in found.values():
            if worker.weight_work is not None:
                self._record.learn_ways(worker.weight_work)
        now_s = self._record.clock.monotonic_s()
        fault = self._record.faults.notice(
            generation=self._record.number,
            step_done=self._record.progress.step,
            since_s=died_s,
            now_s=now_s,
            plan=self._record.plan,
        )
        fault.cause, fault.budget = str(Cause.HEAD), str(Budget.HEAD)
        fault.decided_s = fault.fenced_s = now_s
        self._record.spent.append(
            Spent(budget=Budget.HEAD, at_s=now_s, step_done=self._record.progress.step)
        )
        goes_on = bool(found) and all(worker.ready is not None for worker in found.values())
        if goes_on:
            fault.next = f"{len(found)} worker(s) of generation {self._record.number} go on"
        else:
            fault.next = f"generation {self._record.next_generation} begins"
        told = fault.to_json(self._record.plan)
        self._record.note("fault", fault=told)
        self._record.board.tell(events.FaultJudged(fault=told))
        if goes_on:
            self._adopt(found, now_s=now_s)
            return
        self._record.move(JobState.RECOVERING, reason=reason)
        self._record.group.kill_all(timeout_s=KILL_TIMEOUT_S)
        self._former.form(reason=reason)

    def _adopt(self, found: Mapping[int, Adopted], *, now_s: float) -> None:
        """Make the generation of the head before one's own, as its workers have it."""
        start_step = max(worker.start_step for worker in found.values())
        senders = {rank: worker.sender for rank, worker in found.items()}
        self._record.generation = generation = open_generation(
            self._record.number,
            plan=self._record.plan,
            job=self._record.job,
            job_id=self._record.identity.job_id,
            skeleton_fingerprint=self._record.skeleton.fingerprint(),
            start=Start(step=start_step, checkpoint=None, tokens_seen=None),
            now_s=now_s,
            incarnations=[
                sender.incarnation
                if (sender := senders.get(rank)) is not None
                else self._former.new_incarnation()
                for rank in range(self._record.plan.world_size)
            ],
            make_committer=self._former.make_committer,
        )
        generation.adopted, generation.ready_s = True, now_s
        for rank, worker in found.items():
            member, ready = generation.members[rank], worker.ready
            member.pid, member.host = worker.whereabouts.pid, worker.whereabouts.host
            member.ready = ready
            if ready is not None and ready.data_fingerprint is not None:
                self._record.data_fingerprint = ready.data_fingerprint
        generation.committer.data_fingerprint = self._record.data_fingerprint
        if (fault := self._record.faults.open) is not None:
            fault.ready_s, fault.start_step = now_s, self._record.progress.step
        self._record.move(
            JobState.RUNNING, reason="a new head goes on with the workers of the last"
        )
        for rank in set(range(self._record.plan.world_size)) - set(found):
            failure = lost_worker(
                generation,
                rank,
                "death",
                "its process ended while there was no head",
                step_done=self._record.progress.step,
            )
            self._losses.add(generation, failure)
