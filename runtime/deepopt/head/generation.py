"""What the head knows of the workers of one generation: data with the lifetime of a worker group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepopt.head.commits import Committer
from deepopt.head.liveness import Liveness
from deepopt.planner.plan import Plan
from deepopt.worker.messages import Failure, RunEnded, Sender, WorkerReady


@dataclass(slots=True, kw_only=True)
class Member:
    """One worker.

    Args:
        sender: the identity it was given.
        stages: stages it holds.
        pid: process id on its host; 0 before its process runs.
        host: host name; empty before its process runs.
        ready: its word that it is set up.
        ended: its word that its run ended as asked.
        failure: why it is lost.
    """

    sender: Sender
    stages: tuple[int, ...]
    pid: int = 0
    host: str = ""
    ready: WorkerReady | None = None
    ended: RunEnded | None = None
    failure: Failure | None = None

    def state(self, *, suspect: bool) -> str:
        """`starting`, `running`, `suspect`, `ended` or `lost`, for people."""
        if self.failure is not None:
            return "lost"
        if self.ended is not None:
            return "ended"
        if suspect:
            return "suspect"
        return "starting" if self.ready is None else "running"


@dataclass(slots=True, kw_only=True)
class Generation:
    """One worker group, from its forming to its end.

    Args:
        number: the generation.
        plan: who holds which layers.
        start_step: steps already done when it began.
        began_s: when it was formed.
        members: one a rank, in the order of ranks.
        liveness: signs of life.
        committer: checkpoints in work.
        failures: in the order in which the head learnt of them.
        settle_by_s: when the verdict over the failures is due; None while there are none.
        ended_s: when the last worker's run ended.
        exporting: whether the final weights are being written.
    """

    number: int
    plan: Plan
    start_step: int
    began_s: float
    members: list[Member]
    liveness: Liveness
    committer: Committer
    failures: list[Failure] = field(default_factory=list)
    settle_by_s: float | None = None
    ended_s: float | None = None
    exporting: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether all workers are set up."""
        return all(member.ready is not None for member in self.members)

    @property
    def is_accounted_for(self) -> bool:
        """Whether every worker has failed or ended: no further word will come."""
        return all(member.failure or member.ended for member in self.members)

    @property
    def has_ended(self) -> bool:
        """Whether every worker's run ended as asked."""
        return all(member.ended is not None for member in self.members)

    def owns(self, sender: Sender) -> bool:
        """Whether a message's sender is a worker of this generation, this very process."""
        known = 0 <= sender.rank < len(self.members)
        return known and self.members[sender.rank].sender == sender

    def peak_flops(self) -> Mapping[int, float]:
        """FLOP/s of each rank's device; 0 when unknown."""
        return {m.sender.rank: m.ready.peak_flops for m in self.members if m.ready is not None}


def make_members(
    plan: Plan, *, job_id: str, generation: int, incarnations: Sequence[str]
) -> list[Member]:
    """The workers of a new generation.

    Args:
        plan: who holds which layers.
        job_id: the job.
        generation: its number.
        incarnations: a fresh uuid for each rank.
    """
    return [
        Member(
            sender=Sender(
                job_id=job_id,
                generation=generation,
                plan_id=plan.plan_id,
                rank=rank,
                incarnation=incarnation,
            ),
            stages=plan.held_stages(rank),
        )
        for rank, incarnation in enumerate(incarnations)
    ]
