"""A line chart as SVG: a few series over a few positions, legible in black and white too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import floor

_COLORS = ("#444444", "#1f6fb4", "#c0504d", "#2e8b57", "#8e5ea2", "#d98b19", "#00838f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 380, 60, 44, 190, 46


def line_chart(
    series: Mapping[str, Sequence[float]],
    *,
    positions: Sequence[float],
    title: str,
    x_label: str,
    step: float,
) -> str:
    """Draw series over common positions.

    Args:
        series: values of each line, one for each position; its name stands at its end.
        positions: on the horizontal axis, ascending.
        title: above the drawing.
        x_label: below it.
        step: distance of the horizontal rules, in units of the values.
    """
    values = [value for line in series.values() for value in line]
    low = step * floor(min(values) / step + 1e-9)  # 1.0 lies on its own rule
    high = step * (floor(max(values) / step) + 1)
    bottom = _HEIGHT - _BOTTOM

    def x(position: float) -> float:
        share = (position - positions[0]) / (positions[-1] - positions[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
    ]
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        parts.append(
            f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>'
            f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    parts += [
        f'<text x="{x(position):.1f}" y="{bottom + 18}" text-anchor="middle">{position:g}</text>'
        for position in positions
    ]
    middle = (x(positions[0]) + x(positions[-1])) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    labels_y = _spread({name: y(line[-1]) for name, line in series.items()})
    for (name, line), color in zip(series.items(), _COLORS, strict=False):
        points = [(x(p), y(v)) for p, v in zip(positions, line, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in points
        ]
        parts.append(
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{labels_y[name] + 4:.1f}" fill="{color}">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def _spread(wanted: Mapping[str, float], *, distance: float = 15.0) -> dict[str, float]:
    """Positions near the wanted ones that lie at least so far apart."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, at in sorted(wanted.items(), key=lambda entry: entry[1]):
        last = placed[name] = max(at, last + distance)
    return placed
