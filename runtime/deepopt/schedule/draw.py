"""Pictures of schedules for a terminal: a grid in time, and plain rows for orders that cannot run.

Each is a function from a timeline (or a schedule) to text. Nothing is written to a terminal here, and
neither width nor colour is decided: they are arguments. Files for other tools: `draw_files`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence

from deepopt.schedule.draw_style import (
    ANSI,
    ANSI_END,
    ANSI_FAULT,
    ANSI_RELATED,
    case_words,
    is_up,
    label,
    legend_words,
)
from deepopt.schedule.faults import Fault
from deepopt.schedule.ir import Action, Op, Schedule
from deepopt.schedule.simulate import Span, Timeline

MOST_BANDS = 4  # more than a screen of them hides the shape that a picture is for
_LABELLED = 0.9  # share of the actions whose label shall fit
_TICK_COLUMNS = 12  # least columns between two times of the axis


def draw_text(
    timeline: Timeline,
    *,
    width: int | None = None,
    color: bool = False,
    most_bands: int | None = MOST_BANDS,
    axis: bool = True,
) -> str:
    """A row of characters per rank, time from left to right.

    What is wider than the width is broken into bands below each other. Where that would take too
    many, the whole step is squeezed into the width instead: each column then shows the letter of
    what its rank does most of that time.

    Args:
        timeline: what to draw.
        width: most columns of a row with its name; None for one band as wide as it needs.
        color: with ANSI escapes, one colour per op and direction.
        most_bands: bands before squeezing; None for any number.
        axis: a line of times below each band; False where costs have no unit.
    """
    names = _rank_names(len(timeline.spans))
    room = None if width is None else max(1, width - len(names[0]))
    scale = _columns_per_second(timeline)
    columns = max(1, math.ceil(round(timeline.makespan_s * scale, 6)))
    num_bands = 1 if room is None else -(-columns // room)
    squeezed = False
    if room is not None and most_bands is not None and num_bands > most_bands:
        num_bands, columns = 1, room
        squeezed = True
        scale = room / timeline.makespan_s
        rows = [_Row.squeezed(timeline, rank, scale, room) for rank in range(len(names))]
    else:
        rows = [_Row.labelled(timeline, rank, scale, color=color) for rank in range(len(names))]
        columns = max(columns, *(len(row.text) for row in rows))
    if room is not None:
        columns_a_band = min(room, -(-columns // num_bands))
        edges = [*range(0, columns, columns_a_band), columns]
    else:
        edges = [0, columns]
    lines = [_legend(timeline.schedule, _ops(timeline), color=color)]
    if squeezed:
        lines.append("a column shows what fills most of it")
    for start, end in itertools.pairwise(edges):
        if len(edges) > 2 and start:
            lines.append("")
        lines += [
            (name + row.cut(start, end, color=color)).rstrip()
            for name, row in zip(names, rows, strict=True)
        ]
        if axis and timeline.makespan_s > 0:
            lines.append(" " * len(names[0]) + _axis(start, end, scale))
    return "\n".join(lines)


def draw_order(
    schedule: Schedule,
    *,
    width: int | None = None,
    color: bool = False,
    fault: Fault | None = None,
) -> str:
    """The order of each rank without time, for schedules that cannot run.

    Args:
        schedule: what to draw.
        width: most columns of a row with its name; longer rows are cut around the fault. None
            for whole rows.
        color: with ANSI escapes.
        fault: its action is marked with `!`, also where it is missing, and the actions that the
            fault is about with `~`.
    """
    names = _rank_names(len(schedule.actions))
    marked = {fault.action} if fault else set()
    related = set(fault.related) - marked if fault else set()
    rows = [list(row) for row in schedule.actions]
    if fault is not None and fault.is_missing:
        rows[fault.rank].insert(_place_of_missing(rows[fault.rank], fault.action), fault.action)
    size = max((len(str(action)) for row in rows for action in row), default=1) + 2
    room = None if width is None else max(1, (width - len(names[0]) - 4) // size)
    centers = [_center(row, fault, rank) for rank, row in enumerate(rows)]
    known = [center for center in centers if center is not None]
    elsewhere = known[len(known) // 2] if known else 0
    lines = []
    for name, row, center in zip(names, rows, centers, strict=True):
        start, end = 0, len(row)
        if room is not None and room < len(row):
            middle = elsewhere if center is None else center
            start = max(0, min(middle - room // 2, len(row) - room))
            end = start + room
        cells = []
        for action in row[start:end]:
            mark = "!" if action in marked else "~" if action in related else ""
            text = f"{mark}{action}"
            if color:
                cells.append(_painted(schedule, action, text, mark) + " " * (size - len(text)))
            else:
                cells.append(text.ljust(size))
        before = ".. " if start else ""
        after = ".." if end < len(row) else ""
        lines.append((name + before + "".join(cells) + after).rstrip())
    if fault is not None:
        lines.append(_fault_legend(fault))
    return "\n".join(lines)


class _Row:
    """One rank's columns: a character and a style for each."""

    def __init__(self, text: list[str], styles: list[str]) -> None:
        self.text = text
        self.styles = styles

    @classmethod
    def labelled(cls, timeline: Timeline, rank: int, scale: float, *, color: bool) -> _Row:
        """Every action with its label, at least one column wide."""
        text: list[str] = []
        styles: list[str] = []
        for span in timeline.spans[rank]:
            start = max(len(text), round(span.start_s * scale))
            end = max(start + 1, round(span.end_s * scale))
            text += " " * (start - len(text))
            styles += [""] * (start - len(styles))
            text += _cell(timeline.schedule, span.action, end - start, color=color)
            styles += [_style(timeline.schedule, span.action)] * (end - start)
        return cls(text, styles)

    @classmethod
    def squeezed(cls, timeline: Timeline, rank: int, scale: float, columns: int) -> _Row:
        """The letter of what fills most of each column; a space for idle."""
        best: list[tuple[float, Action | None]] = [(0.0, None)] * columns
        idle = [1.0] * columns
        for span in timeline.spans[rank]:
            first, last = span.start_s * scale, span.end_s * scale
            for column in range(int(first), min(columns, math.ceil(last))):
                share = min(last, column + 1) - max(first, column)
                idle[column] -= share
                if share > best[column][0]:
                    best[column] = (share, span.action)
        text, styles = [], []
        for (share, action), rest in zip(best, idle, strict=True):
            if action is None or rest > share:
                text.append(" ")
                styles.append("")
            else:
                text.append(label(timeline.schedule, action).lstrip("0123456789")[0])
                styles.append(_style(timeline.schedule, action))
        return cls(text, styles)

    def cut(self, start: int, end: int, *, color: bool) -> str:
        """Some columns as they go to a terminal."""
        if not color:
            return "".join(self.text[start:end])
        parts = []
        current = ""
        for character, style in zip(self.text[start:end], self.styles[start:end], strict=True):
            if style != current:
                parts.append((ANSI_END if current else "") + style)
                current = style
            parts.append(character)
        return "".join(parts) + (ANSI_END if current else "")


def _rank_names(num_ranks: int) -> list[str]:
    size = len(f"rank {num_ranks - 1}")
    return [f"rank {rank}".ljust(size) + "  " for rank in range(num_ranks)]


def _ops(timeline: Timeline) -> set[Op]:
    return {span.action.op for row in timeline.spans for span in row}


def _style(schedule: Schedule, action: Action) -> str:
    return ANSI[action.op, is_up(schedule, action)]


def _columns_per_second(timeline: Timeline) -> float:
    """Enough for nearly every label and a column between."""
    needed = sorted(
        (len(label(timeline.schedule, span.action)) + 1) / length
        for span in _spans(timeline)
        if (length := span.end_s - span.start_s) > 0
    )
    return needed[min(len(needed) - 1, int(_LABELLED * len(needed)))] if needed else 0.0


def _spans(timeline: Timeline) -> Iterator[Span]:
    for row in timeline.spans:
        yield from row


def _cell(schedule: Schedule, action: Action, size: int, *, color: bool) -> str:
    text = label(schedule, action)
    if color:
        return text[:size].ljust(size)
    if size > len(text):
        return text.ljust(size - 1, "-") + "|"
    return text[:size]


def _painted(schedule: Schedule, action: Action, text: str, mark: str) -> str:
    style = {"!": ANSI_FAULT, "~": ANSI_RELATED}.get(mark) or ANSI.get(
        (action.op, is_up(schedule, action)), ""
    )
    return style + text + ANSI_END if style else text


def _legend(schedule: Schedule, ops: Collection[Op], *, color: bool) -> str:
    words = []
    for op, name in legend_words(schedule, ops):
        letter = "+stage" if op is Op.REDUCE else op.value
        if color:
            letter = f"{ANSI[op, False]} {letter} {ANSI_END}"
        words.append(f"{letter} {name}")
    if case := case_words(schedule):
        words.append(case)
    return ("  " if color else ", ").join(words)


def _axis(start: int, end: int, scale: float) -> str:
    """Times below some columns, in round steps of milliseconds."""
    step_ms = _round_up(_TICK_COLUMNS / scale * 1e3)
    line = ""
    index = math.ceil(round(start / scale * 1e3 / step_ms, 6))
    while (column := round(index * step_ms / 1e3 * scale) - start) < end - start:
        text = f"^{index * step_ms:g}" + (" ms" if not line else "")
        if column + len(text) > end - start and line:
            break
        line = line.ljust(column) + text
        index += 1
    return line


def _round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below a value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value)


def _center(row: Sequence[Action], fault: Fault | None, rank: int) -> int | None:
    """Where in a row the fault is, or what it is about."""
    if fault is None:
        return None
    wanted = (fault.action, *fault.related) if rank == fault.rank else fault.related
    return next((row.index(action) for action in wanted if action in row), None)


def _place_of_missing(row: Sequence[Action], missing: Action) -> int:
    """After the same op of the micro-batch before, or what comes nearest to it."""
    before = [
        index
        for index, action in enumerate(row)
        if (action.stage, action.op) == (missing.stage, missing.op)
        and (action.microbatch or 0) < (missing.microbatch or 0)
    ]
    own = [
        index
        for index, action in enumerate(row)
        if (action.stage, action.microbatch) == (missing.stage, missing.microbatch)
        and missing.op is not Op.F
    ]
    return max((*before, *own), default=-1) + 1


def _fault_legend(fault: Fault) -> str:
    words = f"! {fault.action}"
    if fault.is_missing:
        words += " should be about here"
    if others := [action for action in fault.related if action != fault.action]:
        words += f"   ~ {', '.join(map(str, others))}"
    return words
