"""Shows a fit: a bar in a terminal, a bar in a notebook, lines elsewhere."""

from __future__ import annotations

import html
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_FORWARD = re.compile(r"\d+F(\d+)")  # stage, operation, micro-batch
LINE_EVERY_S = 5.0  # where no bar can be drawn


class NoView:
    """Shows nothing."""

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""

    def event(self, record: Mapping[str, Any]) -> None:
        """A line of `events.jsonl`."""

    def note(self, text: str) -> None:
        """A remark of the trainer itself."""

    def close(self) -> None:
        """The job is followed no longer."""


class LinesView(NoView):
    """A line every few seconds, the first and the last step among them.

    Args:
        last_step: of the run.
        stream: where to.
    """

    def __init__(self, *, last_step: int, stream: TextIO) -> None:
        self._last_step = last_step
        self._stream = stream
        self._shown_s: float | None = None

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        now_s = time.monotonic()
        due = self._shown_s is None or now_s - self._shown_s >= LINE_EVERY_S
        if due or record["step"] == self._last_step:
            self._shown_s = now_s
            self.note(step_words(record, last_step=self._last_step))

    def note(self, text: str) -> None:
        """A remark of the trainer itself."""
        self._stream.write(text + "\n")
        self._stream.flush()


class BarView(NoView):
    """A bar in a terminal.

    Args:
        last_step: of the run.
    """

    def __init__(self, *, last_step: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("starting", total=last_step, figures="")
        self._bar.start()

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        self._bar.update(self._task, description=str(status.get("state", "")))

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        self._bar.update(self._task, completed=record["step"], figures=figures(record))

    def note(self, text: str) -> None:
        """A remark of the trainer itself."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """The job is followed no longer."""
        self._bar.stop()


class ForwardView(NoView):
    """How far forwards alone are, in a terminal; how many there will be is known to the workers alone."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._done = 0
        self._bar.start()

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        self._done = max(self._done, forwards_done(status))
        words = str(status.get("state", ""))
        if self._done:
            words += f"  micro-batch {self._done}"
        self._bar.update(self._task, description=words)

    def note(self, text: str) -> None:
        """A remark of the trainer itself."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """The job is followed no longer."""
        self._bar.stop()


class NotebookView(NoView):
    """A bar below a notebook's cell; needs IPython alone, no widgets.

    Args:
        last_step: of the run.
        display: `IPython.display.display`.
        html_class: `IPython.display.HTML`.
    """

    def __init__(self, *, last_step: int, display: Any, html_class: Any) -> None:
        self._last_step = last_step
        self._html = html_class
        self._state = "starting"
        self._record: Mapping[str, Any] = {"step": 0}
        self._notes: list[str] = []
        self._handle = display(html_class(self.text()), display_id=True)

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        state = str(status.get("state", ""))
        if state != self._state:
            self._state = state
            self._show()

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        self._record = record
        self._show()

    def note(self, text: str) -> None:
        """A remark of the trainer itself."""
        self._notes.append(text)
        self._show()

    def text(self) -> str:
        """What is shown, as HTML."""
        step = self._record["step"]
        lines = [
            f"{self._state} <progress value='{step}' max='{self._last_step}'></progress> "
            f"{step}/{self._last_step} {html.escape(figures(self._record))}",
            *map(html.escape, self._notes),
        ]
        return "<br>".join(lines)

    def _show(self) -> None:
        self._handle.update(self._html(self.text()))


def make_view(*, last_step: int) -> NoView:
    """The view that fits where this process runs.

    Args:
        last_step: of the run.
    """
    if "ipykernel" in sys.modules and "IPython" in sys.modules:
        from IPython.display import HTML, display  # type: ignore[import-not-found, unused-ignore]

        return NotebookView(last_step=last_step, display=display, html_class=HTML)
    if sys.stderr.isatty():
        return BarView(last_step=last_step)
    return LinesView(last_step=last_step, stream=sys.stderr)


def make_forward_view() -> NoView:
    """The view of a job of forwards alone: a bar in a terminal, nothing elsewhere."""
    return ForwardView() if sys.stderr.isatty() else NoView()


def forwards_done(status: Mapping[str, Any]) -> int:
    """The last micro-batch whose forward a worker is in, from 1; 0 where none is.

    Args:
        status: content of `status.json`.
    """
    found = [_FORWARD.fullmatch(str(w.get("action", ""))) for w in status.get("workers", ())]
    return max((int(match[1]) + 1 for match in found if match), default=0)


def step_words(record: Mapping[str, Any], *, last_step: int) -> str:
    """A step in a line.

    Args:
        record: of `metrics.jsonl`.
        last_step: of the run.
    """
    return f"step {record['step']}/{last_step}  {figures(record)}"


def figures(record: Mapping[str, Any]) -> str:
    """Loss and speed of a step.

    Args:
        record: of `metrics.jsonl`.
    """
    parts = []
    if isinstance(loss := record.get("loss"), int | float):
        parts.append(f"loss {loss:.4f}")
    if isinstance(rate := record.get("tokens_per_s"), int | float):
        parts.append(f"{rate:,.0f} tokens/s")
    return "  ".join(parts)
