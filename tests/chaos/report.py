"""The outcome of each row, and the table of all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _machine import describe as describe
from _processes import end_cleanly_on_signals as end_cleanly_on_signals
from _report import progress as progress
from _report import say as say
from _report import table as draw

NONE = "-"  # in a cell without a figure
PARTS = ("detect", "decide", "fence", "rendezvous", "restore", "replay", "total")


@dataclass(slots=True, kw_only=True)
class Result:
    """The outcome of a row.

    Args:
        act: what it belongs to.
        name: the fault.
        causes: what the reports called it.
        times_s: seconds by part, the sum over the reports; empty where there was none.
        limit_s: the longest total that passes; None where there is none.
        repeated: steps that were done twice.
        lost: steps that were lost.
        losses: whether all were those of an undisturbed run; None: not compared.
        note: what else is worth saying.
        wrong: why it does not pass; empty when it does.
        not_run: why it was not run; empty when it was.
    """

    act: str
    name: str
    causes: Sequence[str] = ()
    times_s: Mapping[str, float] = field(default_factory=dict)
    limit_s: float | None = None
    repeated: int = 0
    lost: int = 0
    losses: bool | None = None
    note: str = ""
    wrong: str = ""
    not_run: str = ""

    @property
    def is_failed(self) -> bool:
        """Whether it was run and does not pass."""
        return bool(self.wrong) and not self.not_run

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {**asdict(self), "passed": None if self.not_run else not self.wrong}

    def cells(self) -> list[str]:
        """Its row of the table."""
        verdict = "not run" if self.not_run else "FAILED" if self.wrong else "passes"
        times = [f"{self.times_s[p]:.2f}" if p in self.times_s else NONE for p in PARTS]
        losses = {None: NONE, True: "equal", False: "DIFFER"}[self.losses]
        return [
            self.name,
            ", ".join(self.causes) or NONE,
            *times,
            NONE if self.limit_s is None or not self.times_s else f"{self.limit_s:g}",
            str(self.repeated),
            str(self.lost),
            losses,
            verdict,
            self.not_run or self.wrong or self.note,
        ]


def table(results: Sequence[Result]) -> str:
    """All rows as a Markdown table; times in seconds."""
    header = ["fault", "named", *PARTS, "limit", "repeated", "lost", "losses", "", ""]
    return draw(header, [result.cells() for result in results])


def sum_of(faults: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by part, over all reports of a row."""
    times: dict[str, float] = {}
    for fault in faults:
        for part, seconds in fault["times_s"].items():
            times[part] = times.get(part, 0.0) + seconds
    return times
