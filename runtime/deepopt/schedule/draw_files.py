"""Pictures of schedules for other programs: SVG for documents, a Perfetto trace for looking closely.

Each is a function from a timeline to the text of a file. Nothing is written to disk here.
"""

from __future__ import annotations

import json
import math
from html import escape

from deepopt.schedule.draw_style import FILL, is_up, legend_words, way_words, ways
from deepopt.schedule.ir import Schedule
from deepopt.schedule.simulate import Span, Timeline

_LEFT, _TOP, _LANE, _GAP = 64, 34, 24, 4  # pixels
_MOST_PIXELS = 4000.0  # a wider drawing is no picture any more
_LABEL_PIXELS = 26.0  # of the shortest action, so that its micro-batch can be read
_DIGIT_PIXELS = 6.5
_LEGEND_PIXELS = 6.2  # a letter, on average
_SWATCH = 14
_LEAST_WIDTH = 420.0  # room for the heading of a short step
_TICK_PIXELS = 70.0


def draw_svg(timeline: Timeline, *, title: str = "") -> str:
    """A drawing for documents: one lane per rank, an axis of time, a legend.

    Args:
        timeline: what to draw.
        title: above the drawing; the schedule's name, sizes and bubble when empty.
    """
    schedule = timeline.schedule
    shortest_s = min(
        (s.end_s - s.start_s for row in timeline.spans for s in row if s.end_s > s.start_s),
        default=1.0,
    )
    makespan_s = max(timeline.makespan_s, shortest_s)
    scale = min(_LABEL_PIXELS / shortest_s, _MOST_PIXELS / makespan_s)
    bottom = _TOP + len(timeline.spans) * (_LANE + _GAP)
    inner = max(timeline.makespan_s * scale + 16, _LEAST_WIDTH)
    legend, legend_height = _legend(timeline, y=bottom + 24, width=inner)
    full_width, height = _LEFT + inner, round(bottom + 24 + legend_height + 10)
    heading = title or (
        f"{schedule.name} ({schedule.placement.kind}), {len(timeline.spans)} ranks, "
        f"{schedule.num_microbatches} micro-batches: bubble {timeline.bubble:.1%}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full_width:.0f} {height}" '
        f'width="{full_width:.0f}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{full_width:.0f}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="20" font-size="13" font-weight="bold">{escape(heading)}</text>',
    ]
    for rank, spans in enumerate(timeline.spans):
        y = _TOP + rank * (_LANE + _GAP)
        parts.append(f'<text x="8" y="{y + 16}">rank {rank}</text>')
        parts.append(
            f'<rect x="{_LEFT}" y="{y}" width="{timeline.makespan_s * scale:.2f}" '
            f'height="{_LANE}" fill="#f1f1f1"/>'
        )
        parts += [_span(schedule, s, y=y, scale=scale) for s in spans]
    return "\n".join([*parts, *_axis(timeline, scale, y=bottom), *legend, "</svg>\n"])


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


def _span(schedule: Schedule, span: Span, *, y: float, scale: float) -> str:
    action = span.action
    start, width = _LEFT + span.start_s * scale, (span.end_s - span.start_s) * scale
    rect = (
        f'<rect x="{start:.2f}" y="{y}" width="{width:.2f}" height="{_LANE}" '
        f'fill="{FILL[action.op][is_up(schedule, action)]}" stroke="#ffffff">'
        f"<title>{escape(str(action))}: {1e3 * span.start_s:.6g} to {1e3 * span.end_s:.6g} ms"
        "</title></rect>"
    )
    label = f"+{action.stage}" if action.microbatch is None else str(action.microbatch)
    if len(label) * _DIGIT_PIXELS > width:
        return rect
    return (
        f'{rect}<text x="{start + width / 2:.2f}" y="{y + 16}" text-anchor="middle">'
        f"{label}</text>"
    )


def _axis(timeline: Timeline, scale: float, *, y: float) -> list[str]:
    """Round times below the lanes."""
    if timeline.makespan_s <= 0:
        return []
    least_ms = 1e3 * _TICK_PIXELS / scale
    power = 10.0 ** math.floor(math.log10(least_ms))
    step_ms = next(power * f for f in (1, 2, 5, 10) if power * f >= least_ms)
    parts = []
    for index in range(int(1e3 * timeline.makespan_s / step_ms + 1e-9) + 1):
        x = _LEFT + index * step_ms / 1e3 * scale
        unit = " ms" if index == 0 else ""
        parts.append(
            f'<line x1="{x:.2f}" y1="{y - _GAP}" x2="{x:.2f}" y2="{y + 2}" stroke="#888888"/>'
            f'<text x="{x:.2f}" y="{y + 13}" fill="#555555" font-size="10" '
            f'text-anchor="{"middle" if index else "start"}">'
            f"{index * step_ms:g}{unit}</text>"
        )
    return parts


def _legend(timeline: Timeline, *, y: float, width: float) -> tuple[list[str], float]:
    """Swatches of the ways of each op with its name, in rows; and how high they are together."""
    schedule = timeline.schedule
    there = {(s.action.op, is_up(schedule, s.action)) for row in timeline.spans for s in row}
    parts: list[str] = []
    x, top = float(_LEFT), y

    def entry(fills: list[str], words: str) -> None:
        nonlocal x, y
        size = len(fills) * _SWATCH + 5 + _LEGEND_PIXELS * len(words) + 12
        if x > _LEFT and x + size > _LEFT + width:
            x, y = float(_LEFT), y + _SWATCH + 6
        for fill in fills:
            parts.append(
                f'<rect x="{x:.0f}" y="{y:.0f}" width="{_SWATCH}" height="{_SWATCH}" '
                f'fill="{fill}"/>'
            )
            x += _SWATCH
        parts.append(f'<text x="{x + 5:.0f}" y="{y + 11:.0f}">{words}</text>')
        x += size - len(fills) * _SWATCH

    for op, name in legend_words(schedule, {op for op, _ in there}):
        entry([FILL[op][up] for up in ways(schedule) if (op, up) in there], name)
    if len(ways(schedule)) > 1:
        entry(
            [], f"full: {way_words(schedule, up=False)}, pale: {way_words(schedule, up=True)}"
        )
    return parts, y + _SWATCH - top
