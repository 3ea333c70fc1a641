"""What the head shows: `status.json`, `events.jsonl`, metrics. Never a reason to stop training.

A disk that refuses is said once in the log; the job goes on and tries again with the next write.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from deepopt.run_directory import RunDirectory
from deepopt.telemetry.events import Event
from deepopt.telemetry.files import (
    JsonLinesWriter,
    encode,
    write_json_atomic,
    write_text_atomic,
)
from deepopt.telemetry.metrics import open_metrics_sinks

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.5  # at most two writes a second between transitions


class Board:
    """The files that people and scripts read while a job runs.

    Args:
        run: the run directory.
        tensorboard: whether TensorBoard files are wanted.

    Raises:
        OSError: the events file cannot be opened.
    """

    def __init__(self, run: RunDirectory, *, tensorboard: bool) -> None:
        self._run = run
        self._events = JsonLinesWriter(run.events)
        self._sinks = open_metrics_sinks(run, tensorboard=tensorboard, on_warning=self.tell)
        self._loads: JsonLinesWriter | None = None  # a model without experts has no such file
        self._written_s: float | None = None
        self._complained: set[str] = set()

    def tell(self, event: Event) -> None:
        """Append an event."""
        logger.info("%s", event.headline())
        self._try("events", lambda: self._events.write(event.to_json()))

    def step(self, step: int, figures: Mapping[str, object]) -> None:
        """Give the figures of a step to all metrics sinks."""
        self._sinks.write(step, figures)

    def expert_loads(self, record: Mapping[str, object]) -> None:
        """Append the loads of a window of steps."""

        def write() -> None:
            if self._loads is None:
                self._loads = JsonLinesWriter(self._run.expert_loads)
            self._loads.write(record)

        self._try("expert loads", write)

    def show(
        self, status: Callable[[], Mapping[str, Any]], *, now_s: float, force: bool = False
    ) -> None:
        """Replace the status file, unless that was done a moment ago.

        Args:
            status: makes the content; called only when it is written.
            now_s: the time.
            force: write in any case: something important has changed.
        """
        due = self._written_s is None or now_s - self._written_s >= STATUS_INTERVAL_S
        if force or due:
            self._written_s = now_s
            # On one line: Python's JSON encoder is ten times as fast without indentation.
            self._try(
                "status", lambda: write_text_atomic(self._run.status, encode(status()) + "\n")
            )

    def report(self, content: Mapping[str, Any]) -> None:
        """Write the closing report."""
        self._try("report", lambda: write_json_atomic(self._run.report, content))

    def close(self) -> None:
        """Close all files."""
        self._sinks.close()
        if self._loads is not None:
            self._loads.close()
        self._events.close()

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._complained:
                self._complained.add(what)
                logger.warning("cannot write %s in %s: %s", what, self._run.root, error)
        else:
            self._complained.discard(what)
