"""The picture of `deepopt top`: the job as `launch` shows it, with its experts and faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from deepopt_cli.expert_panel import ExpertPanel
from deepopt_cli.fault_words import fault_lines
from deepopt_cli.job_picture import JobPicture

FAULTS_SHOWN = 1  # block; `deepopt status` has more


class TopPicture:
    """Takes what a run directory says and draws it.

    Args:
        title: name of the job and its run directory.
        layer: whose experts are mapped; None: the first router's.
        only_ascii: draw with characters of every terminal.
    """

    def __init__(
        self, *, title: str, layer: str | None = None, only_ascii: bool = False
    ) -> None:
        self._job = JobPicture(title=title)
        self.experts = ExpertPanel(layer=layer, only_ascii=only_ascii)
        self._faults: Sequence[Mapping[str, Any]] = ()

    @property
    def state(self) -> str:
        """Of the job, as it was told last."""
        return self._job.state

    def status(self, status: Mapping[str, Any]) -> None:
        """Take the present status."""
        self._job.status(status)
        self._faults = status.get("faults") or ()

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a line of `metrics.jsonl`."""
        self._job.step(record)
        self.experts.step(record)

    def event(self, record: Mapping[str, Any]) -> None:
        """Take a line of `events.jsonl`."""
        self._job.event(record)

    def loads(self, record: Mapping[str, Any]) -> None:
        """Take a line of `expert_loads.jsonl`."""
        self.experts.loads(record)

    def render(self, *, note: str = "") -> RenderableType:
        """The picture.

        Args:
            note: a line at the bottom.
        """
        blocks = [self._job.summary(), self.experts.render(), self._fault_block()]
        blocks += [self._job.events(), [Text(note, style="italic")] if note else []]
        parts: list[RenderableType] = []
        for block in filter(None, blocks):
            if parts:
                parts.append(Text(""))
            parts += block
        return Group(*parts)

    def _fault_block(self) -> list[RenderableType]:
        lines = fault_lines(self._faults, most=FAULTS_SHOWN)
        return [Text(line, no_wrap=True) for line in lines]
