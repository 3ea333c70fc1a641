"""Two plain ways to show a job that is being followed: lines for people, JSON lines for machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepopt_cli.output import say, say_json, tell
from deepopt_cli.words import event_line, step_line

# In events.jsonl like all others; but a line each would hide the steps, and an error is said, with
# its culprit, at the end.
QUIET_EVENTS = frozenset({"worker_ready", "message_refused", "error"})


class PlainView:
    """One line a step, one line an event; for logs and pipes.

    Args:
        every: steps between two lines; the first and the last one are always shown.
    """

    def __init__(self, *, every: int) -> None:
        self._every = every
        self._last_step: int | None = None
        self._pace_s: float | None = None

    def status(self, status: Mapping[str, Any]) -> None:
        """Remember what steps are shown with."""
        self._last_step = status.get("last_step")
        left = (self._last_step or 0) - int(status.get("step") or 0)
        if left > 0 and status.get("eta_s") is not None:
            self._pace_s = status["eta_s"] / left

    def step(self, record: Mapping[str, Any]) -> None:
        """A line, where `logging.every` wants one."""
        step = record.get("step", 0)
        if step == 1 or step % self._every == 0 or step == self._last_step:
            left = (self._last_step or 0) - step
            eta_s = left * self._pace_s if left > 0 and self._pace_s is not None else None
            say(step_line(record, last_step=self._last_step, eta_s=eta_s))

    def event(self, record: Mapping[str, Any]) -> None:
        """A line, unless there would be too many of its kind."""
        if record.get("kind") not in QUIET_EVENTS:
            say(event_line(record))

    def note(self, text: str) -> None:
        """A line on stderr."""
        tell(text)

    def close(self) -> None:
        """Nothing is held open."""


class JsonView:
    """The lines of `metrics.jsonl` on stdout, as they come; words for people on stderr."""

    def status(self, status: Mapping[str, Any]) -> None:
        """Not shown: the caller prints the last one."""

    def step(self, record: Mapping[str, Any]) -> None:
        """The line itself."""
        say_json(record)

    def event(self, record: Mapping[str, Any]) -> None:
        """Warnings and losses only, for people."""
        if record.get("kind") in ("warning", "worker_lost", "fault", "recovered"):
            tell(event_line(record))

    def note(self, text: str) -> None:
        """A line on stderr."""
        tell(text)

    def close(self) -> None:
        """Nothing is held open."""
