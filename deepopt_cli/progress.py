"""A bar on stderr that fills up, where stderr is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

BAR_WIDTH = 30


class ProgressBar:
    """One line: what is done now, and how much of all; gone when it is over."""

    def __init__(self) -> None:
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def tell(self, what: str, share: float) -> None:
        """Redraw the line where it changed.

        Args:
            what: is done now.
            share: of all that is done, 0 to 1.
        """
        line = bar_line(what, share)
        if line == self._shown or not sys.stderr.isatty():
            return
        self._shown = line
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def bar_line(what: str, share: float) -> str:
    """The line of a bar.

    Args:
        what: is done now.
        share: of all that is done.
    """
    filled = round(BAR_WIDTH * min(1.0, max(0.0, share)))
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {100 * share:3.0f} %  {what}"
