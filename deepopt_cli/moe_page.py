"""The page of `deepopt moe report`: one HTML file with inline SVG, nothing loaded from elsewhere. Pure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from deepopt.telemetry.load_map import windows_by_layer

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 200, 48, 24
MOST_COLUMNS = 200  # of a heat map; more windows are joined

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right;
  border-bottom: 1px solid #ddd; } td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: #555; }
p.note { color: #555; }
"""


def make_page(
    report: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]],
    loads: Sequence[Mapping[str, Any]],
    title: str,
) -> str:
    """The whole page.

    Args:
        report: as `expert_report` made it.
        metrics: lines of `metrics.jsonl`.
        loads: lines of `expert_loads.jsonl`.
        title: which run.
    """
    steps = {line["step"]: line for line in metrics if line.get("max_vio") is not None}
    parts = [
        f"<h1>Expert loads of {html.escape(title)}</h1>",
        _table(report),
        "<h2>MaxVio: load of the busiest expert over the mean, less 1</h2>",
        _lines(
            steps,
            {"max_vio": "#1f6feb", "max_vio_unbiased": "#bbb"},
            {"max_vio": "as routed", "max_vio_unbiased": "without bias (sampled tokens)"},
        ),
        "<h2>Gate mass lost against top-k without bias</h2>",
        _lines(steps, {"gate_mass_lost": "#b5540a"}, {"gate_mass_lost": "share"}),
        "<h2>Load of each expert</h2>",
        '<p class="note">A row an expert, a column a window of steps. White is an even load, blue less, '
        "red twice as much and more.</p>",
    ]
    for layer, windows in windows_by_layer(loads).items():
        parts += [f"<h3>{html.escape(layer)}</h3>", _heat_map(windows)]
    parts += ["<h2>Forecast for the next 1,000 steps</h2>", _forecast(report)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Expert loads</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(report: Mapping[str, Any]) -> str:
    names = {
        "max_vio": "MaxVio",
        "max_vio_unbiased": "MaxVio without bias",
        "straggler_factor": "busiest device over the mean",
        "gate_mass_lost": "gate mass lost",
        "dead_experts": "dead experts",
        "shrunk_experts": "experts with shrunk gradients",
    }
    rows = "".join(
        f"<tr><td>{name}</td><td>{_figure(report['first'].get(key))}</td>"
        f"<td>{_figure(report['last'].get(key))}</td></tr>"
        for key, name in names.items()
    )
    return (
        f"<table><tr><th></th><th>step {report['first_step']}</th><th>mean of the last steps</th></tr>"
        f"{rows}</table>"
    )


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "-"


def _lines(
    steps: Mapping[int, Mapping[str, Any]], colours: Mapping[str, str], names: Mapping[str, str]
) -> str:
    """Curves over steps."""
    first, last = min(steps), max(steps)
    values = {
        key: [
            (step, float(line[key]))
            for step, line in sorted(steps.items())
            if isinstance(line.get(key), int | float)
        ]
        for key in colours
    }
    top = max((value for points in values.values() for _, value in points), default=0) or 1.0
    plot_w, plot_h = WIDTH - LEFT, HEIGHT - BOTTOM

    def place(step: int, value: float) -> str:
        x = LEFT + plot_w * (step - first) / max(1, last - first)
        return f"{x:.1f},{plot_h * (1 - max(0.0, value) / top) + 4:.1f}"

    drawn = []
    for number, (key, points) in enumerate(values.items()):
        path = " ".join(place(step, value) for step, value in points)
        drawn.append(
            f'<polyline fill="none" stroke="{colours[key]}" stroke-width="1.5" points="{path}"/>'
            f'<text x="{WIDTH - 8}" y="{16 + 14 * number}" text-anchor="end" '
            f'style="fill:{colours[key]}">{names[key]}</text>'
        )
    axis = (
        f'<line x1="{LEFT}" y1="{plot_h + 4}" x2="{WIDTH}" y2="{plot_h + 4}" stroke="#999"/>'
        f'<text x="{LEFT - 6}" y="12" text-anchor="end">{top:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{plot_h + 4}" text-anchor="end">0</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">step {first}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">step {last}</text>'
    )
    return _svg(HEIGHT, "".join((*drawn, axis)))


def _heat_map(windows: Sequence[tuple[int, Sequence[int]]]) -> str:
    columns = []
    count = min(MOST_COLUMNS, len(windows))
    for i in range(count):
        part = windows[i * len(windows) // count : (i + 1) * len(windows) // count]
        columns.append([sum(loads) for loads in zip(*(w for _, w in part), strict=True)])
    num_experts = len(columns[0])
    cell_h = max(1.0, min(14.0, 320 / num_experts))
    cell_w = (WIDTH - LEFT) / len(columns)
    height = num_experts * cell_h
    cells = []
    for x, column in enumerate(columns):
        mean = sum(column) / num_experts
        for expert, load in enumerate(column):
            colour = _colour(load / mean) if mean else "#eee"
            cells.append(
                f'<rect x="{LEFT + x * cell_w:.1f}" y="{expert * cell_h:.1f}" '
                f'width="{cell_w + 0.3:.1f}" height="{cell_h + 0.3:.1f}" fill="{colour}"/>'
            )
    labels = (
        f'<text x="{LEFT - 6}" y="11" text-anchor="end">0</text>'
        f'<text x="{LEFT - 6}" y="{height:.0f}" text-anchor="end">{num_experts - 1}</text>'
        f'<text x="{WIDTH}" y="{height + 16:.0f}" text-anchor="end">step {windows[-1][0]}</text>'
    )
    return _svg(int(height) + BOTTOM, "".join((*cells, labels)))


def _colour(ratio: float) -> str:
    """White at 1; towards blue at 0, towards red at 2 and above."""
    strength = min(1.0, abs(ratio - 1.0))
    faded = round(255 - 200 * strength)
    return f"rgb(255,{faded},{faded})" if ratio > 1 else f"rgb({faded},{faded},255)"


def _forecast(report: Mapping[str, Any]) -> str:
    errors = report["forecast_error"]
    rows = "".join(
        f"<tr><td>{steps} steps</td><td>{100 * error:.2f} %</td></tr>"
        for steps, error in errors.items()
    )
    note = (
        "Error of earlier forecasts: mean distance to the load that came, over the mean load."
    )
    if not errors:
        return '<p class="note">No forecast\'s horizon has passed yet.</p>'
    return (
        f'<p class="note">{note}</p><table><tr><th>over</th><th>error</th></tr>{rows}</table>'
    )


def _svg(height: int, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"{content}</svg>"
    )
