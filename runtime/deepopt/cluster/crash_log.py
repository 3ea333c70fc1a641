"""What a process that crashed left in its log: the fatal-signal handler's words and stack."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 64 << 10  # a stack of all threads is far shorter
_FATAL = re.compile(r"^(Fatal Python error: .+|terminate called .+|.*CUDA error: .+)$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crash:
    """The end of a log.

    Args:
        headline: the line that says what happened; empty when there is none.
        text: that line and what follows.
    """

    headline: str
    text: str


def read_crash(log: Path, *, start: int) -> Crash:
    """Look for a crash in a log.

    Args:
        log: the file; need not exist.
        start: where this process began to write, in bytes.
    """
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start, size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return Crash(headline="", text="")
    found = list(_FATAL.finditer(text))
    if not found:
        return Crash(headline="", text="")
    last = found[-1]
    return Crash(
        headline=last[0].removeprefix("Fatal Python error: "), text=text[last.start() :]
    )
