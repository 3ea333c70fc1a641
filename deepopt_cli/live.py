"""The live view on a terminal: one screen part that is redrawn, made with Rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from deepopt.clock import Clock, SystemClock
from deepopt_cli.job_picture import JobPicture

REFRESH_S = 0.25


class LiveView:
    """Shows state, progress, workers and the last events of a job in place.

    Args:
        title: name of the job and its run directory.
        console: where to draw.
        clock: for the rate of redrawing.
    """

    def __init__(self, *, title: str, console: Console, clock: Clock | None = None) -> None:
        self._picture = JobPicture(title=title)
        self._clock = clock or SystemClock()
        self._note = "Ctrl-C stops the job with a checkpoint"
        self._drawn_s = float("-inf")
        self._live = Live(self.render(), console=console, auto_refresh=False)
        self._live.start(refresh=True)

    def status(self, status: Mapping[str, Any]) -> None:
        """Take the present status, and redraw when it is time."""
        before = self._picture.state
        self._picture.status(status)
        self._draw(force=self._picture.state != before)

    def step(self, record: Mapping[str, Any]) -> None:
        """Take the figures of the last step."""
        self._picture.step(record)

    def event(self, record: Mapping[str, Any]) -> None:
        """Take an event."""
        self._picture.event(record)

    def note(self, text: str) -> None:
        """Show a remark at the bottom."""
        self._note = text
        self._draw(force=True)

    def close(self) -> None:
        """Draw a last time and leave the picture on the terminal."""
        self._note = ""
        self._draw(force=True)
        self._live.stop()

    def render(self) -> RenderableType:
        """The picture."""
        parts = [*self._picture.summary(), *self._picture.events()]
        if self._note:
            parts.append(Text(self._note, style="italic"))
        return Group(*parts)

    def _draw(self, *, force: bool) -> None:
        now_s = self._clock.monotonic_s()
        if force or now_s - self._drawn_s >= REFRESH_S:
            self._drawn_s = now_s
            self._live.update(self.render(), refresh=True)
