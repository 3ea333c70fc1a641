"""What the terminal shows: data on stdout, words for people on stderr, errors with the next step.

`reports_errors` is the edge of every command: a user's mistake becomes `error: ...`, a blank line,
`hint: ...` and an exit code; anything unexpected becomes one line that says where its traceback
lies. This module needs nothing but the standard library and typer, so that `--help` stays fast.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec

import typer

P = ParamSpec("P")

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it
EXIT_ERROR = 1
TRACEBACK_VARIABLE = "DEEPOPT_TRACEBACK"
# What to do about a file that cannot be read or written, where a command has no better words.
FILE_REMEDIES = {
    errno.ENOENT: "check the path: the file, or the folder it shall be in, is not there",
    errno.EACCES: "check who may read and write there, or name another path",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENOSPC: "make room on that disk, or name a path on another one",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
}


def say(text: str = "") -> None:
    """A line on stdout, visible at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """A line for people on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(value: Mapping[str, object]) -> None:
    """A JSON object as one line on stdout; NaN and infinity as null."""
    from deepopt.telemetry.files import encode

    say(encode(value))


class ProgressLine:
    """One line on stderr that says what goes on, and is gone when it is over.

    Says nothing where stderr is no terminal.
    """

    def __enter__(self) -> ProgressLine:
        return self

    def tell(self, text: str) -> None:
        """Replace the line."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text} ...")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def show_error(message: str, *, remedy: str = "", details: str = "") -> None:
    """Say an error on stderr.

    Args:
        message: one line: what, where, values.
        remedy: the next step; empty when there is none to name.
        details: lines between the two, for example a traceback.
    """
    parts = [f"error: {message}"]
    if details:
        parts.append(details.rstrip("\n"))
    if remedy:
        parts.append(f"hint: {remedy}")
    tell("\n\n".join(parts))


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Make a function the body of a command: its exceptions become messages and exit codes."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            tell("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Nobody reads on; without this, closing stdout at exit would raise once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except Exception as error:  # noqa: BLE001 - the process edge, and it reports
            raise typer.Exit(_report(error)) from None

    return run


def _report(error: Exception) -> int:
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        tell("".join(traceback.format_exception(error)))
    # Fields instead of the class: another distribution may shadow `deepopt` itself.
    message = getattr(error, "message", None)
    exit_code = getattr(type(error), "exit_code", None)
    if isinstance(message, str) and isinstance(exit_code, int):
        show_error(message, remedy=getattr(error, "remedy", ""))
        return exit_code
    if isinstance(error, OSError) and error.filename is not None:
        remedy = FILE_REMEDIES.get(error.errno or 0, "")
        show_error(f"{error.filename}: {error.strerror}", remedy=remedy)
        return EXIT_ERROR
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "deepopt":
        from deepopt_cli.distributions import explain_shadow

        show_error(f"cannot import {error.name}: {error}", remedy=explain_shadow())
        return EXIT_ERROR
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    show_error(
        f"unexpected {type(error).__name__} at {where}: {error}",
        remedy="this is a bug in deepopt: please report it with "
        f"{_save_traceback(error)}; {TRACEBACK_VARIABLE}=1 prints the traceback",
    )
    return EXIT_ERROR


def _save_traceback(error: Exception) -> str:
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="deepopt-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return "its traceback"
    return file.name


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right.

    Args:
        header: names of the columns.
        rows: cells by row; None is shown as `-`.
    """
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [
        bool(cells) and all(_is_number(cell) for cell in column[1:]) for column in columns
    ]
    lines = []
    for row in ([*header], *cells):
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.split(" ")[0].replace(".", "").replace("%", "").isdigit()


def human_count(value: float) -> str:
    """A count with three digits and a letter: 950, 12.3k, 4.56M, 7.00B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            digits = 2 - min(2, int(math.log10(max(1.0, abs(scaled)))))
            return f"{scaled:.{digits}f}{letter}"
    return f"{value:.0f}"


def human_seconds(seconds: float | None) -> str:
    """A duration: 0.4 s, 42 s, 3:07, 2:03:07, 3 d 04:00; `-` when unknown."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def human_percent(share: float | None) -> str:
    """A share as a percentage; `-` when unknown."""
    return "-" if share is None else f"{100 * share:.0f} %"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as ranges: `0-3, 6`."""
    ordered = sorted(set(numbers))
    parts: list[str] = []
    start = 0
    for i, number in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != number + 1:
            parts.append(f"{ordered[start]}" if start == i else f"{ordered[start]}-{number}")
            start = i + 1
    return ", ".join(parts)


def as_json(value: object) -> str:
    """JSON over several lines, for people and files."""
    return json.dumps(value, indent=2, default=str)
