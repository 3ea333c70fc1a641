"""What a benchmark prints: figures on stdout, progress on stderr, the ratio as the last line."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def say(text: str = "") -> None:
    """A line of the result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def progress(text: str) -> None:
    """A line for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under a header, as a Markdown table: the first to the left, the others to the right.

    Args:
        header: a title a column.
        rows: cells of each row, as many as the header has.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = [
        "-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)
    ]

    def draw(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    return "\n".join(draw(line) for line in (header, rule, *rows))


def ratio_line(ratio: float, *, aim: float | None) -> str:
    """The last line of every benchmark; above 1 is better for deepopt.

    Args:
        ratio: ours against the named peer.
        aim: what the project wants at least; None when it wants nothing.
    """
    return f"ratio: {ratio:.2f}" + ("" if aim is None else f" (aim {aim:.2f})")
