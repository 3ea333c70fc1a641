"""What a terminal shows of a job: state, progress, figures, workers, last events; made with Rich.

Takes the contents of the run directory's files and draws; reads nothing by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deepopt.launch.run_view import ENDED, status_age_s
from deepopt_cli.output import human_count, human_percent, human_seconds, ranges
from deepopt_cli.views import QUIET_EVENTS
from deepopt_cli.words import event_line, heartbeat_age

NUM_EVENTS = 5
BAR_WIDTH = 40
BUSY_WIDTH = 10

_STATE_STYLES = {
    "running": "green",
    "finished": "green",
    "recovering": "yellow",
    "stopping": "yellow",
    "failed": "bold red",
}


class JobPicture:
    """State, progress, workers and the last events of a job.

    Args:
        title: name of the job and its run directory.
    """

    def __init__(self, *, title: str) -> None:
        self._title = title
        self._status: Mapping[str, Any] = {"state": "starting"}
        self._record: Mapping[str, Any] = {}
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        self._validated = ""  # what the last evaluation gave

    @property
    def state(self) -> str:
        """Of the job, as it was told last."""
        return str(self._status.get("state"))

    def status(self, status: Mapping[str, Any]) -> None:
        """Take the present status."""
        self._status = status

    def step(self, record: Mapping[str, Any]) -> None:
        """Take the figures of the last step."""
        self._record = record
        if isinstance(loss := record.get("val_loss"), int | float):
            self._validated = f"val loss {loss:.4f} (step {record.get('step')})"

    def event(self, record: Mapping[str, Any]) -> None:
        """Take an event."""
        if record.get("kind") not in QUIET_EVENTS:
            self._events.append(event_line(record))

    def summary(self) -> list[RenderableType]:
        """State, progress, figures, workers, one below the other."""
        status, state = self._status, self.state
        head = Text.assemble(
            (self._title, "bold"), "  ", (state, _STATE_STYLES.get(state, "bold"))
        )
        if status.get("generation"):
            head.append(
                f"  generation {status['generation']}  {status.get('placement')}, "
                f"{status.get('schedule')}"
            )
        parts: list[RenderableType] = [head]
        if status.get("last_step"):
            parts += [self._progress(), self._figures()]
        if status.get("workers"):
            parts.append(self._workers())
        return parts

    def events(self) -> list[RenderableType]:
        """The last ones, a line each."""
        return [Text(line, style="dim", no_wrap=True) for line in self._events]

    def _progress(self) -> RenderableType:
        done, total = self._last_step_done(), self._status["last_step"]
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=min(done, total), width=BAR_WIDTH)
        left = "" if self._status["state"] in ENDED else self._status.get("eta_s")
        eta = f"ETA {human_seconds(left)}" if isinstance(left, float) else ""
        row.add_row(Text(f"step {done}/{total}"), bar, Text(eta))
        return row

    def _last_step_done(self) -> int:
        # Figures come with each step, the status twice a second; after a restart, the status
        # alone goes back.
        replayed = self._record.get("generation") != self._status.get("generation")
        step = int(self._status.get("step") or 0)
        return step if replayed else max(step, int(self._record.get("step") or 0))

    def _figures(self) -> Text:
        status, record = self._status, self._record
        words = []
        loss = record.get("loss", status.get("loss"))
        if isinstance(loss, int | float):
            words.append(f"loss {loss:.4f}")
        if evaluation := status.get("evaluation"):
            words.append(f"evaluating {evaluation['begun']}/{evaluation['total']}")
        elif self._validated:
            words.append(self._validated)
        for key, name in (
            ("tokens_per_s", "tokens/s"),
            ("tokens_per_s_per_worker", "tokens/s a worker"),
        ):
            if isinstance(rate := record.get(key, status.get(key)), int | float):
                words.append(f"{human_count(rate)} {name}")
        if isinstance(mfu := record.get("mfu", status.get("mfu")), int | float):
            words.append(f"MFU {100 * mfu:.1f} %")
        if isinstance(bubble := record.get("bubble", status.get("bubble")), int | float):
            words.append(f"bubble {human_percent(bubble)}")
        if isinstance(max_vio := record.get("max_vio"), int | float):
            words.append(
                f"MaxVio {max_vio:.2f}, busiest device {record['straggler_factor']:.2f}x"
            )
        if status.get("restarts"):
            words.append(f"{status['restarts']} restarts")
        if status.get("checkpoint_step"):
            words.append(f"checkpoint {status['checkpoint_step']}")
        return Text("  ".join(words) or "waiting for the first step", no_wrap=True)

    def _workers(self) -> RenderableType:
        grid = Table(box=None, padding=(0, 1), header_style="dim")
        for name in (
            "rank",
            "stages",
            "busy",
            "",
            "state",
            "step",
            "action",
            "heard",
            "host",
            "pid",
        ):
            grid.add_column(name, no_wrap=True)
        age_s = status_age_s(dict(self._status)) or 0.0
        if self._status.get("state") in ENDED:
            age_s = 0.0
        busy = self._status.get("stage_busy") or {}
        for worker in self._status["workers"]:
            share = busy.get(str(worker["rank"]))
            bar = (
                ""
                if share is None
                else ProgressBar(total=1.0, completed=share, width=BUSY_WIDTH)
            )
            grid.add_row(
                str(worker["rank"]),
                ranges(worker["stages"]),
                bar,
                human_percent(share),
                str(worker.get("state") or "-"),
                str(worker.get("step") or "-"),
                str(worker.get("action") or "-"),
                heartbeat_age(worker, age_s=age_s),
                str(worker["host"]),
                str(worker["pid"]),
            )
        return grid
