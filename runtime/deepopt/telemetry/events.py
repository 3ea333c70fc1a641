"""Typed events: what happened to a job, one schema for people and machines.

Each event is a line of `events.jsonl`, `{"time": ..., "kind": ..., ...}`, written by the head.
`headline` says a line in words, also one of a kind that this version does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from deepopt.clock import utc_now


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What all events have.

    Args:
        time: when, ISO 8601 in UTC.
    """

    kind: ClassVar[str]
    time: str = field(default_factory=utc_now)

    def to_json(self) -> dict[str, Any]:
        """As a line of `events.jsonl`."""
        entries = asdict(self)
        return {"time": entries.pop("time"), "kind": self.kind, **entries}

    def headline(self) -> str:
        """The event in words, on one line, without its time."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged(Event):
    """The job has a new state.

    Args:
        state: the new one.
        previous: the one before; None for the first.
        reason: why, in a few words.
    """

    kind: ClassVar[str] = "state"
    state: str
    previous: str | None = None
    reason: str = ""

    def headline(self) -> str:
        """The event in words."""
        return self.state + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFormed(Event):
    """A worker group came together.

    Args:
        generation: its number.
        plan_id: the plan it works by.
        num_workers: its size.
        start_step: steps already done.
        checkpoint: folder of the checkpoint it starts from; None: from the seed.
        reason: why it was formed, in a few words.
        source: where the layers' state comes from: `seed`, `checkpoint`, `survivors`, `copies` that
            other workers train, or `replicas` kept in memory.
        kept: ranks whose process lived on.
    """

    kind: ClassVar[str] = "generation"
    generation: int
    plan_id: int
    num_workers: int
    start_step: int
    checkpoint: str | None = None
    reason: str = ""
    source: str = ""
    kept: tuple[int, ...] = ()

    def headline(self) -> str:
        """The event in words."""
        origin = f"after step {self.start_step}" if self.start_step else "from the seed"
        if self.source in ("survivors", "copies", "replicas"):
            origin += f", from {self.source}"
        why = f" ({self.reason})" if self.reason else ""
        return f"generation {self.generation}: {self.num_workers} workers, {origin}{why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized(Event):
    """The job goes on with another number of workers, by another plan.

    Args:
        plan_id: the new plan.
        num_workers: its workers.
        wanted: workers of the full job.
        reason: why, in a few words.
    """

    kind: ClassVar[str] = "resized"
    plan_id: int
    num_workers: int
    wanted: int
    reason: str

    def headline(self) -> str:
        """The event in words."""
        return (
            f"{self.reason} (plan {self.plan_id}, {self.num_workers} of {self.wanted} workers)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerBecameReady(Event):
    """A worker has its layers and its process groups.

    Args:
        rank: its rank.
        generation: the worker group.
        pid: process id on its host.
        host: host name.
        stages: stages it holds.
        device: for example `cpu` or `cuda:0`.
        setup_s: seconds by part of the set-up.
    """

    kind: ClassVar[str] = "worker_ready"
    rank: int
    generation: int
    pid: int
    host: str
    stages: tuple[int, ...]
    device: str
    setup_s: Mapping[str, float] = field(default_factory=dict)

    def headline(self) -> str:
        """The event in words."""
        stages = ", ".join(map(str, self.stages))
        place = f"{self.device}, {self.host} pid {self.pid}"
        return f"rank {self.rank} ready: stages {stages} on {place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NumbersWereBad(Event):
    """A step's loss or gradients were bad, and the job went on.

    Args:
        step: the step.
        what: the values, in words.
        skipped: whether its update was left out; else computing it again came out good, so a device
            or a link is to be suspected.
    """

    kind: ClassVar[str] = "bad_numbers"
    step: int
    what: str
    skipped: bool

    def headline(self) -> str:
        """The event in words."""
        if self.skipped:
            return f"step {self.step} left out: {self.what}"
        return f"step {self.step} computed again, which came out good: {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightWorkChosen(Event):
    """A worker found out when the weight gradients of its layers are computed.

    Args:
        rank: the worker.
        generation: its worker group.
        notes: a line for each layer where they do not all simply wait: which way, why.
    """

    kind: ClassVar[str] = "weight_work"
    rank: int
    generation: int
    notes: tuple[str, ...]

    def headline(self) -> str:
        """The event in words."""
        return f"rank {self.rank}: weight gradients of {'; of '.join(self.notes)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost(Event):
    """A worker died, hung or failed.

    Args:
        rank: its rank.
        generation: the worker group that ends with it.
        pid: process id on its host.
        host: host name.
        step: step in work; 0 before the first.
        action: action in work, for example `2F5`; empty when between actions.
        failure: `error`, `death`, `hang` or `setup`, as in `worker.messages.Failure`.
        message: one line.
    """

    kind: ClassVar[str] = "worker_lost"
    rank: int
    generation: int
    pid: int
    host: str
    step: int
    action: str
    failure: str
    message: str

    def headline(self) -> str:
        """The event in words."""
        action = f", action {self.action}" if self.action else ""
        where = f"{self.host} pid {self.pid}, step {self.step}{action}"
        return f"lost rank {self.rank} ({self.failure}) on {where}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultJudged(Event):
    """The head knows whose fault it was and what it does about it.

    Args:
        fault: as in `status.json`: culprit, victims, cause, what happens next.
    """

    kind: ClassVar[str] = "fault"
    fault: Mapping[str, Any]

    def headline(self) -> str:
        """The event in words."""
        culprit = self.fault.get("culprit")
        what = "the head's process ended"
        if culprit:
            who = f"rank {culprit.get('rank')} on {culprit.get('host') or 'an unknown host'}"
            what = f"{who}: {culprit.get('message')}"
        return f"fault {self.fault.get('number')}: {what}; {self.fault.get('next')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOver(Event):
    """A fault is over: a new step is done, or another fault came, or the job ended.

    Args:
        fault: as in `status.json`, with its times.
    """

    kind: ClassVar[str] = "recovered"
    fault: Mapping[str, Any]

    def headline(self) -> str:
        """The event in words."""
        times = self.fault.get("times_s") or {}
        parts = ", ".join(f"{name} {s:.2f} s" for name, s in times.items() if name != "total")
        total = f" in {times['total']:.2f} s" if "total" in times else ""
        return f"fault {self.fault.get('number')} {self.fault.get('outcome')}{total}: {parts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted(Event):
    """A checkpoint is whole and verified on disk.

    Args:
        step: step after which it was taken.
        path: its folder.
        size_bytes: of all its shards.
    """

    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    size_bytes: int = 0

    def headline(self) -> str:
        """The event in words."""
        size = f" ({self.size_bytes / 1e6:.1f} MB)" if self.size_bytes else ""
        return f"checkpoint of step {self.step}{size}: {self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWasNotWritten(Event):
    """A checkpoint could not be written, or was found damaged; training goes on.

    Args:
        step: its step.
        reason: one line: file, error.
        rank: the worker that failed; None when it is nobody's in particular.
    """

    kind: ClassVar[str] = "checkpoint_failed"
    step: int
    reason: str
    rank: int | None = None

    def headline(self) -> str:
        """The event in words."""
        who = "" if self.rank is None else f" on rank {self.rank}"
        return f"checkpoint of step {self.step} failed{who}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRefused(Event):
    """A message came from another generation and was not used.

    Args:
        rank: the speaker.
        generation: the speaker's generation.
        current_generation: the head's.
        message: class of the message.
    """

    kind: ClassVar[str] = "message_refused"
    rank: int
    generation: int
    current_generation: int
    message: str

    def headline(self) -> str:
        """The event in words."""
        return (
            f"refused {self.message} from rank {self.rank} of generation {self.generation}; "
            f"generation {self.current_generation} is at work"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested(Event):
    """Somebody asked the job to stop.

    Args:
        request: `stop`, `preempt` or `kill`.
        checkpoint: whether a checkpoint is wanted.
        who: who got SIGTERM; empty when a person asked.
    """

    kind: ClassVar[str] = "stop_requested"
    request: str
    checkpoint: bool
    who: str = ""

    def headline(self) -> str:
        """The event in words."""
        why = f", {self.who} got SIGTERM" if self.who else ""
        with_checkpoint = ", with a checkpoint" if self.checkpoint else ""
        return f"{self.request} requested{why}{with_checkpoint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something is not right, and the job goes on.

    Args:
        message: one line.
        remedy: the next step; empty when there is none to name.
    """

    kind: ClassVar[str] = "warning"
    message: str
    remedy: str = ""

    def headline(self) -> str:
        """The event in words."""
        return f"warning: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Event):
    """The job ends badly; the culprit is in `status.json`.

    Args:
        message: one line.
        remedy: the next step; empty when there is none to name.
        exit_code: what the command line will return.
    """

    kind: ClassVar[str] = "error"
    message: str
    remedy: str = ""
    exit_code: int = 1

    def headline(self) -> str:
        """The event in words."""
        return f"error: {self.message}"


KINDS: dict[str, type[Event]] = {
    event.kind: event
    for event in (
        StateChanged,
        GenerationFormed,
        NumbersWereBad,
        WorkerBecameReady,
        WeightWorkChosen,
        WorkerLost,
        FaultJudged,
        FaultOver,
        CheckpointCommitted,
        CheckpointWasNotWritten,
        MessageRefused,
        StopRequested,
        Warned,
        Failed,
    )
}


def parse_event(record: Mapping[str, Any]) -> Event | None:
    """The event of a line of `events.jsonl`; None when this version does not know its shape.

    Args:
        record: a line; fields that a later version added are left out.
    """
    event = KINDS.get(str(record.get("kind")))
    if event is None:
        return None
    known = {f.name for f in fields(event)}
    try:
        return event(**{name: value for name, value in record.items() if name in known})
    except TypeError:  # a field without a default is missing
        return None


def headline(record: Mapping[str, Any]) -> str:
    """A line of `events.jsonl` in words, without its time.

    Args:
        record: a line, also of an unknown kind.
    """
    event = parse_event(record)
    if event is not None:
        return event.headline()
    entries = [
        f"{name}={value}" for name, value in record.items() if name not in ("time", "kind")
    ]
    return " ".join([str(record.get("kind", "event")), *entries])
