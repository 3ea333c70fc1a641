"""What the head knows of the workers of one generation: data with the lifetime of a worker group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deepopt.cluster.group import how_gone
from deepopt.errors import WorkersLostError
from deepopt.head.commits import Committer
from deepopt.head.liveness import Finding, Liveness
from deepopt.planner.plan import Plan
from deepopt.worker.messages import Failure, RunEnded, Sender, Standing, WorkerReady


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
        preempted: whether it got SIGTERM.
        exit_words: how its process ended, its host's agent says; empty before.
        gone_s: when its agent saw that, on the head's monotonic clock; None before.
    """

    sender: Sender
    stages: tuple[int, ...]
    pid: int = 0
    host: str = ""
    ready: WorkerReady | None = None
    ended: RunEnded | None = None
    failure: Failure | None = None
    preempted: bool = False
    exit_words: str = ""
    gone_s: float | None = None

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
        not_before_s: when it is due at the earliest: a recovery that did not help waits.
        ready_s: when the last worker was ready; None before.
        gets_on: whether it has done a step that was not done before.
        ended_s: when the last worker's run ended.
        exporting: whether the final weights are being written.
        adopted: whether a head before this one has formed it.
        interrupted: whether its workers were told that it has ended.
        interrupted_s: when that was.
        called_off: why they were told so although nobody was lost; None as a rule.
        unplaced: ranks that no device can be had for.
        leaving: whether its workers were asked to leave it, for a larger one.
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
    not_before_s: float = 0.0
    ready_s: float | None = None
    gets_on: bool = False
    ended_s: float | None = None
    exporting: bool = False
    adopted: bool = False
    interrupted: bool = False
    interrupted_s: float = 0.0
    called_off: Finding | None = None
    unplaced: frozenset[int] = frozenset()
    leaving: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether all workers are set up."""
        return all(member.ready is not None for member in self.members)

    @property
    def has_left(self) -> bool:
        """Whether the workers' runs ended because they were asked to leave."""
        return any(m.ended is not None and m.ended.reason == "left" for m in self.members)

    @property
    def has_ended(self) -> bool:
        """Whether every worker's run ended as asked."""
        return all(member.ended is not None for member in self.members)

    def owns(self, sender: Sender) -> bool:
        """Whether a message's sender is a worker of this generation, this very process."""
        known = 0 <= sender.rank < len(self.members)
        return known and self.members[sender.rank].sender == sender

    def rank_of(self, pid: int, *, host: str) -> int | None:
        """The worker that has a process; None when none has it."""
        for member in self.members:
            if member.pid == pid and member.host == host:
                return member.sender.rank
        return None

    def note_exit(self, rank: int, words: str, *, at_s: float) -> None:
        """Take an agent's word on how a process ended, also into what was said of it before.

        Args:
            rank: the worker.
            words: `process_look.exit_words`.
            at_s: when the agent saw it, on the head's monotonic clock.
        """
        member = self.members[rank]
        member.exit_words, member.gone_s = words, at_s
        before = member.failure
        if before is None:
            return
        member.failure = with_exit(before, words)
        self.failures[self.failures.index(before)] = member.failure

    def standings(self) -> dict[int, Standing]:
        """What the workers have that can go on in another generation, by rank."""
        found = {}
        for member in self.members:
            if member.failure is not None:
                standing = member.failure.standing
            else:
                standing = None if member.ended is None else member.ended.standing
            if standing is not None:
                found[member.sender.rank] = standing
        return found

    def peak_flops(self) -> Mapping[int, float]:
        """FLOP/s of each rank's device; 0 when unknown."""
        return {m.sender.rank: m.ready.peak_flops for m in self.members if m.ready is not None}


def with_exit(failure: Failure, words: str) -> Failure:
    """A failure with its host's agent's word on how the process ended, where that says more.

    Args:
        failure: as it was told.
        words: `process_look.exit_words`; empty when nobody knows.
    """
    if failure.kind != "death" or failure.traceback or not words:
        return failure
    return replace(failure, message=how_gone(words))


def make_members(
    plan: Plan, *, job_id: str, generation: int, incarnations: Sequence[str]
) -> list[Member]:
    """The workers of a new generation.

    Args:
        plan: who holds which layers.
        job_id: the job.
        generation: its number.
        incarnations: uuid of each rank's process.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LateStart:
    """A worker that keeps its group from starting.

    Args:
        rank: the worker.
        message: one line with the values.
    """

    rank: int
    message: str


def find_late_start(
    generation: Generation, *, now_s: float, timeout_s: float
) -> LateStart | None:
    """The worker to blame for a start that takes too long; None while it does not.

    Args:
        generation: the workers.
        now_s: the time.
        timeout_s: longest start, `faults.setup_timeout_s`.
    """
    lasted_s = now_s - generation.began_s
    waiting = [member for member in generation.members if member.ready is None]
    if not waiting or lasted_s <= timeout_s:
        return None
    # A worker without a process keeps those that have one waiting.
    culprit = min(waiting, key=lambda member: (member.pid > 0, member.sender.rank))
    what = "is not ready" if culprit.pid else "has no process"
    return LateStart(
        rank=culprit.sender.rank,
        message=f"{what} after {lasted_s:.0f} s (faults.setup_timeout_s {timeout_s:g})",
    )


def lost_worker(
    generation: Generation,
    rank: int,
    kind: str,
    message: str,
    *,
    step_done: int,
    traceback: str = "",
    cause: str = "",
) -> Failure:
    """What the head itself says of a worker that cannot speak any more.

    Args:
        generation: its group.
        rank: the worker.
        kind: `death` or `hang`.
        message: one line.
        step_done: the last step that all have done.
        traceback: what its process left behind; empty when nothing.
        cause: one of `liveness.Cause`.
    """
    member = generation.members[rank]
    beat = generation.liveness.last(rank)
    step, action = 0, ""
    if beat is not None and member.ready is not None:
        # Its last sign may be older than the last step that all have done.
        step = max(beat.step, step_done + 1)
        action = beat.action if beat.step == step else ""
    return Failure(
        sender=member.sender,
        kind=kind,
        step=step,
        action=action,
        message=message,
        traceback=traceback,
        exit_code=WorkersLostError.exit_code,
        pid=member.pid,
        host=member.host,
        cause=cause,
    )
