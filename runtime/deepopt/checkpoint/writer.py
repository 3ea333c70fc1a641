"""Writes snapshots of layers to disk in the background, so that the step does not wait.

One checkpoint at a time: the caller asks `busy` or `wait_idle` before it makes the next
snapshot, so that no more than one lies in memory. Making the snapshot (CPU copies) is the
caller's part, committing the head's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import ShardEntry
from deepopt.checkpoint.store import CheckpointStore
from deepopt.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """A thread that writes one rank's layers.

    Args:
        store: where to.
        writer_rank: rank that writes.
        on_written: called on the writer's thread with the step and its shards, all fsynced.
        on_failed: called on the writer's thread with the step and one line: file and error.
    """

    def __init__(
        self,
        store: CheckpointStore,
        writer_rank: int,
        on_written: Callable[[int, tuple[ShardEntry, ...]], None],
        on_failed: Callable[[int, str], None],
    ) -> None:
        self._store = store
        self._writer_rank = writer_rank
        self._on_written = on_written
        self._on_failed = on_failed
        self._changed = threading.Condition()
        self._work: tuple[int, int, tuple[LayerState, ...]] | None = None
        self._busy_step: int | None = None
        self._closing = False
        # A daemon, so that a disk that never answers cannot keep the process alive.
        self._thread = threading.Thread(
            target=self._run, name=f"checkpoint-writer-{writer_rank}", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written or reported."""
        with self._changed:
            return self._busy_step is not None

    def submit(self, step: int, generation: int, states: Sequence[LayerState]) -> None:
        """Begin to write a checkpoint and return at once.

        Args:
            step: optimizer steps done.
            generation: the writer's worker group.
            states: snapshots that nobody changes any more; dropped when they are written.

        Raises:
            CheckpointError: the writer is busy or closed.
        """
        with self._changed:
            if self._closing:
                raise CheckpointError(f"cannot checkpoint step {step}: the writer is closed")
            if self._busy_step is not None:
                raise CheckpointError(
                    f"cannot checkpoint step {step}: step {self._busy_step} is still being "
                    "written",
                    remedy="raise checkpoint.every, or use a faster disk",
                )
            self._busy_step = step
            self._work = (step, generation, tuple(states))
            self._changed.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is being written and all callbacks have returned.

        Args:
            timeout_s: how long at most.

        Returns:
            False when the time was over first.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self._busy_step is None, timeout=timeout_s)

    def close(self, timeout_s: float = 60.0) -> bool:
        """Finish what is being written and end the thread; a repeated call is fine.

        Args:
            timeout_s: how long to wait at most; afterwards the thread is left to end with the
                process, and what it was writing stays uncommitted.

        Returns:
            False when the time was over first.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                # Idle, not blocked: `close` ends it, and a daemon ends with its process.
                self._changed.wait_for(lambda: self._work is not None or self._closing)
                if self._work is None:
                    return
                step, generation, states = self._work
                self._work = None
            try:
                self._write(step, generation=generation, states=states)
            except Exception:  # the thread's edge: the next checkpoint may go well
                logger.exception("reporting the checkpoint of step %d failed", step)
            finally:
                del states
                with self._changed:
                    self._busy_step = None
                    self._changed.notify_all()

    def _write(self, step: int, *, generation: int, states: tuple[LayerState, ...]) -> None:
        try:
            self._store.begin(step, generation)
            shards = tuple(
                self._store.write_layer(step, generation, state, self._writer_rank)
                for state in states
            )
        except CheckpointError as error:
            self._on_failed(step, error.message)
        except Exception as error:  # e.g. out of memory: training goes on
            logger.exception("writing the checkpoint of step %d failed", step)
            self._on_failed(step, f"{type(error).__name__}: {error}")
        else:
            self._on_written(step, shards)
