"""Pictures of schedules: a text grid, an SVG, a Perfetto trace.

Each is a function from a timeline (or, for orders that do not run, a schedule) to text. Nothing is
written to disk or to a terminal here, and no decision is taken about colour: it is an argument.
Upper-case letters run on the way down; lower-case on the way up: direction `up` of a mirror, and
the second leg of a V.
"""

from __future__ import annotations

import json
from html import escape

from deepopt.schedule.ir import Action, Direction, Op, PlacementKind, Schedule
from deepopt.schedule.simulate import Span, Timeline

_ANSI = {
    (Op.F, False): "\x1b[30;44m",
    (Op.F, True): "\x1b[30;46m",
    (Op.I, False): "\x1b[30;42m",
    (Op.I, True): "\x1b[30;102m",
    (Op.W, False): "\x1b[30;43m",
    (Op.W, True): "\x1b[30;103m",
    (Op.B, False): "\x1b[30;42m",
    (Op.B, True): "\x1b[30;102m",
    (Op.R, False): "\x1b[30;45m",
    (Op.R, True): "\x1b[30;105m",
    (Op.REDUCE, False): "\x1b[30;47m",
    (Op.REDUCE, True): "\x1b[30;47m",
}
_ANSI_FAULT = "\x1b[97;41m"
_ANSI_END = "\x1b[0m"

# Fills that keep black text readable and stay apart for the colour-blind: down, up.
_FILL = {
    Op.F: ("#8ab6e8", "#b9e3f0"),
    Op.I: ("#8fd19e", "#c9ecc4"),
    Op.W: ("#f2cf73", "#faeaba"),
    Op.B: ("#8fd19e", "#c9ecc4"),
    Op.R: ("#cfa9dd", "#e8d5ef"),
    Op.REDUCE: ("#c8c8c8", "#c8c8c8"),
}
_FAULT_STROKE = "#d0021b"

_NAMES = {
    Op.F: "forward",
    Op.I: "input gradient",
    Op.W: "weight gradient",
    Op.B: "backward",
    Op.R: "prepare",
    Op.REDUCE: "reduce and update",
}


def draw_text(
    timeline: Timeline,
    *,
    width: int | None = None,
    color: bool = False,
    fault: Action | None = None,
) -> str:
    """A row of characters per rank, time from left to right.

    Args:
        timeline: what to draw.
        width: most columns of a row with its name; None for as many as every label needs. Labels
            that do not fit are cut, and an action always keeps one column where there are enough.
        color: with ANSI escapes, one colour per op and direction.
        fault: an action to mark with `!`.
    """
    names = _rank_names(len(timeline.spans))
    schedule = timeline.schedule
    scale = _columns_per_second(
        timeline, width=None if width is None else width - len(names[0])
    )
    lines = [_legend(schedule, {s.action.op for row in timeline.spans for s in row})]
    for name, spans in zip(names, timeline.spans, strict=True):
        cells: list[str] = []
        column = 0
        for span in spans:
            start = max(column, round(span.start_s * scale))
            end = max(start + 1, round(span.end_s * scale))
            cells.append(" " * (start - column))
            cells.append(_cell(schedule, span.action, end - start, color=color, fault=fault))
            column = end
        lines.append((name + "".join(cells)).rstrip())
    lines.append(
        f"{schedule.name}: {timeline.makespan_s:.6g} s a step, bubble {timeline.bubble:.1%}"
    )
    return "\n".join(lines)


def draw_order(schedule: Schedule, *, color: bool = False, fault: Action | None = None) -> str:
    """The order of each rank without time, for schedules that cannot run.

    Args:
        schedule: what to draw.
        color: with ANSI escapes.
        fault: an action to mark with `!`.
    """
    names = _rank_names(len(schedule.actions))
    actions = [action for row in schedule.actions for action in row]
    size = max((len(str(action)) for action in actions), default=1) + 2
    lines = []
    for name, row in zip(names, schedule.actions, strict=True):
        cells = [
            _paint(
                schedule,
                action,
                (f"!{action}" if action == fault else str(action)).ljust(size),
                color=color,
                fault=fault,
            )
            for action in row
        ]
        lines.append((name + "".join(cells)).rstrip())
    return "\n".join(lines)


def draw_svg(timeline: Timeline, *, title: str = "", fault: Action | None = None) -> str:
    """A drawing for documents: one lane per rank, an axis of time, a legend.

    Args:
        timeline: what to draw.
        title: above the drawing; the schedule's name and bubble when empty.
        fault: an action to frame in red.
    """
    schedule = timeline.schedule
    left, top, lane, gap = 60, 34, 26, 4
    shortest = min(
        (s.end_s - s.start_s for row in timeline.spans for s in row if s.end_s > s.start_s),
        default=1.0,
    )
    scale = min(22.0 / shortest, 4000.0 / max(timeline.makespan_s, shortest))
    height = top + len(timeline.spans) * (lane + gap)
    ops = {span.action.op for row in timeline.spans for span in row}
    legend = [(op, up) for op in _NAMES if op in ops for up in _ways(schedule)]
    width = max(left + timeline.makespan_s * scale + 10, left + 150.0 * len(legend))
    heading = title or (
        f"{schedule.name}, {len(timeline.spans)} ranks, {schedule.num_microbatches} "
        f"micro-batches: bubble {timeline.bubble:.1%}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height + 34}" '
        f'width="{width:.0f}" height="{height + 34}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height + 34}" fill="#ffffff"/>',
        f'<text x="{left}" y="20" font-size="13">{escape(heading)}</text>',
    ]
    for rank, spans in enumerate(timeline.spans):
        y = top + rank * (lane + gap)
        parts.append(f'<text x="6" y="{y + 17}">rank {rank}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{timeline.makespan_s * scale:.2f}" '
            f'height="{lane}" fill="#f4f4f4"/>'
        )
        parts += [
            _svg_span(schedule, s, x=left, y=y, scale=scale, lane=lane, fault=fault)
            for s in spans
        ]
    for index, (op, up) in enumerate(legend):
        x = left + 150 * index
        way = (" up" if up else " down") if len(_ways(schedule)) > 1 else ""
        parts.append(
            f'<rect x="{x}" y="{height + 12}" width="14" height="14" fill="{_FILL[op][up]}"/>'
            f'<text x="{x + 20}" y="{height + 23}">{_NAMES[op]}{way}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def perfetto(timeline: Timeline) -> str:
    """A Chrome trace (JSON) that ui.perfetto.dev opens: one track per rank.

    Args:
        timeline: what to draw.
    """
    schedule = timeline.schedule
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": schedule.name}}
    ]
    for rank, spans in enumerate(timeline.spans):
        events.append(
            {
                "ph": "M",
                "pid": 0,
                "tid": rank,
                "name": "thread_name",
                "args": {"name": f"rank {rank}"},
            }
        )
        for span in spans:
            action = span.action
            fields: dict[str, object] = {"stage": action.stage}
            if action.microbatch is not None:
                fields["microbatch"] = action.microbatch
                fields["direction"] = schedule.directions[action.microbatch].value
            events.append(
                {
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "name": str(action),
                    "cat": action.op.value,
                    "ts": span.start_s * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                    "args": fields,
                }
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _rank_names(num_ranks: int) -> list[str]:
    size = len(f"rank {num_ranks - 1}")
    return [f"rank {rank}".ljust(size) + "  " for rank in range(num_ranks)]


def _is_up(schedule: Schedule, action: Action) -> bool:
    if schedule.placement.kind is PlacementKind.V:
        return action.stage >= schedule.placement.num_ranks
    if action.microbatch is None:
        return False
    return schedule.directions[action.microbatch] is Direction.UP


def _ways(schedule: Schedule) -> tuple[bool, ...]:
    one_way = schedule.placement.kind is PlacementKind.LINE
    return (False,) if one_way else (False, True)


def _label(schedule: Schedule, action: Action) -> str:
    if action.microbatch is None:
        return f"+{action.stage}"
    letter = action.op.value.lower() if _is_up(schedule, action) else action.op.value
    return f"{letter}{action.microbatch}"


def _columns_per_second(timeline: Timeline, *, width: int | None) -> float:
    """Enough for every label and a column between, unless the width forbids."""
    needed = 0.0
    for spans in timeline.spans:
        for span in spans:
            length = span.end_s - span.start_s
            if length > 0:
                label = _label(timeline.schedule, span.action)
                needed = max(needed, (len(label) + 1) / length)
    if width is not None and timeline.makespan_s > 0:
        needed = min(needed, max(1, width) / timeline.makespan_s)
    return needed


def _cell(
    schedule: Schedule, action: Action, size: int, *, color: bool, fault: Action | None
) -> str:
    label = _label(schedule, action)
    if action == fault:
        label = "!" + label
    text = label[:size].ljust(size, " " if color else "-")
    if not color and size > len(label):
        text = text[:-1] + "|"
    return _paint(schedule, action, text, color=color, fault=fault)


def _paint(
    schedule: Schedule, action: Action, text: str, *, color: bool, fault: Action | None
) -> str:
    if not color:
        return text
    if action == fault:
        return _ANSI_FAULT + text + _ANSI_END
    return _ANSI[action.op, _is_up(schedule, action)] + text + _ANSI_END


def _legend(schedule: Schedule, ops: set[Op]) -> str:
    words = [
        f"{'+stage' if op is Op.REDUCE else op.value} {name}"
        for op, name in _NAMES.items()
        if op in ops
    ]
    if schedule.placement.kind is PlacementKind.MIRROR:
        words.append("lower case: direction up")
    elif schedule.placement.kind is PlacementKind.V:
        words.append("lower case: second leg")
    return ", ".join(words)


def _svg_span(
    schedule: Schedule,
    span: Span,
    *,
    x: float,
    y: float,
    scale: float,
    lane: int,
    fault: Action | None,
) -> str:
    action = span.action
    start, width = x + span.start_s * scale, (span.end_s - span.start_s) * scale
    stroke = _FAULT_STROKE if action == fault else "#ffffff"
    rect = (
        f'<rect x="{start:.2f}" y="{y}" width="{width:.2f}" height="{lane}" '
        f'fill="{_FILL[action.op][_is_up(schedule, action)]}" stroke="{stroke}" '
        f'stroke-width="{3 if action == fault else 1}"><title>{escape(str(action))}: '
        f"{span.start_s:.6g} to {span.end_s:.6g} s</title></rect>"
    )
    label = "" if action.microbatch is None else str(action.microbatch)
    if len(label) * 7 > width:
        return rect
    return (
        rect + f'<text x="{start + width / 2:.2f}" y="{y + 17}" text-anchor="middle">'
        f"{label}</text>"
    )
