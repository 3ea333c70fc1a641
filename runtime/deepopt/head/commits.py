"""Turns shards that all writers report into committed checkpoints, apart from the head's loop.

A commit reads and hashes files (retention verifies them), which may take long; it runs on an
executor, and its outcome is polled. Nothing here decides when to checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deepopt.checkpoint.manifest import Manifest, ShardEntry
from deepopt.clock import utc_now
from deepopt.errors import DeepoptError
from deepopt.worker.messages import CheckpointFailed, ShardsWritten


class Store(Protocol):
    """What is needed of `checkpoint.store.CheckpointStore`."""

    def commit(self, manifest: Manifest) -> Path:
        """Make a checkpoint the committed one of its step."""
        ...

    def discard(self, step: int, generation: int) -> None:
        """Remove the work folder of a checkpoint that failed."""
        ...

    def retire(self) -> list[Path]:
        """Keep the newest verified checkpoints, remove older ones."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What the checkpoints of one generation have in common.

    Args:
        job_id: the job.
        generation: the worker group.
        num_writers: workers that report for each checkpoint.
        plan: the plan's `to_json()`.
        plan_fingerprint: the plan's hash.
        skeleton_fingerprint: the model's.
        seed: the job's seed.
        num_groups: gradient groups of one step.
    """

    job_id: str
    generation: int
    num_writers: int
    plan: dict[str, Any]
    plan_fingerprint: str
    skeleton_fingerprint: str
    seed: int
    num_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint is committed.

    Args:
        step: its step.
        path: its folder.
        size_bytes: of all its shards.
        warning: what went wrong afterwards, at retiring older ones; empty when nothing did.
    """

    step: int
    path: Path
    size_bytes: int
    warning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotCommitted:
    """A checkpoint is not there; what was committed before stays.

    Args:
        step: its step.
        reason: one line.
        rank: the worker that could not write; None when the commit itself failed.
    """

    step: int
    reason: str
    rank: int | None = None


@dataclass(slots=True)
class _Gathering:
    shards: list[ShardEntry] = field(default_factory=list)
    heard: set[int] = field(default_factory=set)
    data_state: Mapping[str, Any] | None = None
    failed: bool = False


class Committer:
    """The checkpoints in work of one generation.

    Args:
        store: where they lie.
        executor: runs commits, one at a time.
        origin: what they have in common.
        tokens_seen: tokens trained on up to a step; None when unknown.
    """

    def __init__(
        self,
        store: Store,
        *,
        executor: Executor,
        origin: Origin,
        tokens_seen: Callable[[int], int | None],
    ) -> None:
        self._store = store
        self._executor = executor
        self._origin = origin
        self._tokens_seen = tokens_seen
        self.data_fingerprint: str | None = (
            None  # hash of the data source, once a worker told it
        )
        self._gathering: dict[int, _Gathering] = {}
        self._commits: dict[int, Future[Committed]] = {}
        self._refused: list[NotCommitted] = []

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being gathered or committed, or an outcome waits."""
        return bool(self._gathering or self._commits or self._refused)

    def written(self, message: ShardsWritten) -> None:
        """A worker has written its part; the last one starts the commit."""
        gathering = self._gathering.setdefault(message.step, _Gathering())
        if message.sender.rank in gathering.heard:
            return
        gathering.heard.add(message.sender.rank)
        gathering.shards.extend(message.shards)
        if message.data_state is not None:
            gathering.data_state = message.data_state
        self._settle(message.step, gathering)

    def failed(self, message: CheckpointFailed) -> None:
        """A worker could not write its part: there will be no checkpoint of this step."""
        gathering = self._gathering.setdefault(message.step, _Gathering())
        gathering.heard.add(message.sender.rank)
        if not gathering.failed:
            gathering.failed = True
            self._refused.append(
                NotCommitted(step=message.step, reason=message.reason, rank=message.sender.rank)
            )
        self._settle(message.step, gathering)

    def poll(self) -> list[Committed | NotCommitted]:
        """The outcomes since the last call."""
        outcomes: list[Committed | NotCommitted] = [*self._refused]
        self._refused = []
        for step, commit in list(self._commits.items()):
            if commit.done():
                del self._commits[step]
                outcomes.append(_outcome(step, commit))
        return outcomes

    def drain(self, *, timeout_s: float) -> list[Committed | NotCommitted]:
        """Wait for the commits under way, give up what is not whole, and return all outcomes."""
        wait(list(self._commits.values()), timeout=timeout_s)
        self._gathering.clear()
        return self.poll()

    def _settle(self, step: int, gathering: _Gathering) -> None:
        if len(gathering.heard) < self._origin.num_writers:
            return
        del self._gathering[step]
        if gathering.failed:
            self._executor.submit(self._store.discard, step, self._origin.generation)
            return
        tokens_seen = self._tokens_seen(step)
        self._commits[step] = self._executor.submit(
            _commit,
            self._store,
            origin=self._origin,
            step=step,
            gathering=gathering,
            tokens_seen=tokens_seen,
            data_fingerprint=self.data_fingerprint,
        )


def _commit(
    store: Store,
    *,
    origin: Origin,
    step: int,
    gathering: _Gathering,
    tokens_seen: int | None,
    data_fingerprint: str | None,
) -> Committed:
    path = store.commit(
        Manifest(
            job_id=origin.job_id,
            step=step,
            generation=origin.generation,
            plan=origin.plan,
            plan_fingerprint=origin.plan_fingerprint,
            skeleton_fingerprint=origin.skeleton_fingerprint,
            seed=origin.seed,
            num_groups=origin.num_groups,
            tokens_seen=tokens_seen,
            data_fingerprint=data_fingerprint,
            data_state=None if gathering.data_state is None else dict(gathering.data_state),
            created_at=utc_now(),
            shards=tuple(gathering.shards),
        )
    )
    warning = ""
    try:
        store.retire()
    except DeepoptError as error:  # the new checkpoint stands; older ones just stay longer
        warning = f"older checkpoints were not removed: {error.message}"
    return Committed(
        step=step,
        path=path,
        size_bytes=sum(entry.size_bytes for entry in gathering.shards),
        warning=warning,
    )


def _outcome(step: int, commit: Future[Committed]) -> Committed | NotCommitted:
    error = commit.exception()
    if error is None:
        return commit.result()
    reason = error.message if isinstance(error, DeepoptError) else repr(error)
    return NotCommitted(step=step, reason=reason)
