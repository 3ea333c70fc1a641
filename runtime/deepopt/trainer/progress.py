"""Shows a fit: a bar in a terminal, a bar in a notebook, lines elsewhere."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

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
        self._waited_since_s: float | None = None  # for an evaluation

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`; long evaluations have lines."""
        words, now_s = evaluation_words(status), time.monotonic()
        if not words:
            self._waited_since_s = None
        elif self._waited_since_s is None:
            self._waited_since_s = now_s
        elif now_s - self._waited_since_s >= LINE_EVERY_S:
            self._waited_since_s = now_s
            self.note(words)

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


class ForwardLinesView(LinesView):
    """Lines of forwards alone, where they take long."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`: who asked for the loss gets it."""


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
        self._bar.update(
            self._task, description=evaluation_words(status) or str(status.get("state", ""))
        )

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
    """How far forwards alone are, in a terminal: a bar of micro-batches, as soon as the workers know how many
    there are."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        self._bar.update(self._task, description=str(status.get("state", "")))
        evaluation = status.get("evaluation")
        if evaluation:
            self._bar.update(
                self._task, completed=evaluation["begun"], total=evaluation["total"]
            )

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
        self._evaluation: Mapping[str, int] | None = None
        self._record: Mapping[str, Any] = {"step": 0}
        self._notes: list[str] = []
        self._handle = display(html_class(self.text()), display_id=True)

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        state, evaluation = str(status.get("state", "")), status.get("evaluation")
        if (state, evaluation) != (self._state, self._evaluation):
            self._state, self._evaluation = state, evaluation
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
        word, done, total = self._state, self._record["step"], self._last_step
        if self._evaluation:
            word, done = "evaluating", self._evaluation["begun"]
            total = self._evaluation["total"]
        lines = [
            f"{word} <progress value='{done}' max='{total}'></progress> "
            f"{done}/{total} {html.escape(figures(self._record))}",
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
    """The view of a job of forwards alone: a bar in a terminal or a notebook, else lines where it is long."""
    if "ipykernel" in sys.modules and "IPython" in sys.modules:
        return make_view(last_step=1)
    if sys.stderr.isatty():
        return ForwardView()
    return ForwardLinesView(last_step=1, stream=sys.stderr)


def evaluation_words(status: Mapping[str, Any]) -> str:
    """How far the evaluation in work is; empty where there is none.

    Args:
        status: content of `status.json`.
    """
    evaluation = status.get("evaluation")
    if not evaluation:
        return ""
    return f"evaluating: micro-batch {evaluation['begun']} of {evaluation['total']}"


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
