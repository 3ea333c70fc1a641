"""How evenly experts are loaded, as a part of `deepopt top`: figures, MaxVio over steps, a heat map.

Takes the lines of `metrics.jsonl` and `expert_loads.jsonl` as they come; reads nothing by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from deepopt.head.load_forecast import LoadForecast
from deepopt.telemetry.load_map import BLOCKS, EVEN, MOST_COLUMNS, SHADES, draw_load_map
from deepopt_cli.expert_words import forecast_words

_BELOW, _ABOVE = "blue", "red"  # of an even load; the characters say it without colour
_FULL = 1.0  # a MaxVio of so much, or of the largest seen if that is less, fills a column


class ExpertPanel:
    """Of one job.

    Args:
        layer: whose heat map; None: the first router's.
        only_ascii: draw with characters of every terminal.
    """

    def __init__(self, *, layer: str | None, only_ascii: bool) -> None:
        self._layer = layer
        self._only_ascii = only_ascii
        self._record: Mapping[str, Any] = {}
        self._max_vio: dict[int, float] = {}
        self._windows: dict[str, dict[int, Sequence[int]]] = {}
        self._forecast = LoadForecast()

    @property
    def layers(self) -> list[str]:
        """That have routers, as far as is known."""
        return sorted(self._windows, key=_by_number)

    def step(self, record: Mapping[str, Any]) -> None:
        """Take a line of `metrics.jsonl`."""
        if record.get("max_vio") is not None:
            self._record = record
            self._max_vio[int(record["step"])] = float(record["max_vio"])

    def loads(self, record: Mapping[str, Any]) -> None:
        """Take a line of `expert_loads.jsonl`."""
        for layer, tokens in record["loads"].items():
            self._windows.setdefault(layer, {})[int(record["step"])] = tokens
            self._forecast.add(
                layer, tokens, first_step=record["first_step"], step=record["step"]
            )

    def render(self) -> list[RenderableType]:
        """Nothing for a model without experts."""
        record = self._record
        if not record:
            return []
        figures = Text(
            f"experts  MaxVio {record['max_vio']:.2f} "
            f"(window {record['max_vio_window']:.2f}, without bias {record['max_vio_unbiased']:.2f})  "
            f"busiest device {record['straggler_factor']:.2f}x  "
            f"gate mass lost {100 * record['gate_mass_lost']:.1f} %  "
            f"{record['dead_experts']:.0f} dead",
            no_wrap=True,
        )
        parts: list[RenderableType] = [figures, *self._curve()]
        layer = self._layer or next(iter(self.layers), None)
        if layer in self._windows:
            parts += self._map(layer)
        if errors := self._forecast.errors():
            parts.append(Text(f"load forecast off by {forecast_words(errors)}", no_wrap=True))
        return parts

    def _shades(self) -> tuple[str, str]:
        return (SHADES, EVEN) if self._only_ascii else (BLOCKS, BLOCKS[len(BLOCKS) // 2])

    def _curve(self) -> list[RenderableType]:
        """MaxVio over steps: the largest of the steps of each column."""
        values = [self._max_vio[step] for step in sorted(self._max_vio)]
        count = min(MOST_COLUMNS, len(values))
        columns = [
            max(values[i * len(values) // count : (i + 1) * len(values) // count])
            for i in range(count)
        ]
        shades, _ = self._shades()
        full = min(_FULL, max(columns)) or 1.0
        line = "".join(
            shades[max(1, min(len(shades) - 1, round(value / full * (len(shades) - 1))))]
            for value in columns
        )
        return [Text(f"{'MaxVio':>9} |{line}| at most {max(values):.2f}", no_wrap=True)]

    def _map(self, layer: str) -> list[RenderableType]:
        shades, even = self._shades()
        windows = [tokens for _, tokens in sorted(self._windows[layer].items())]
        others = len(self._windows) - 1
        more = f"; {others} more, see --layer" if others else ""
        title = f"load of each expert of {layer} over the steps ('{even}' even, '{shades[-1]}' twice){more}"
        lines: list[RenderableType] = [Text(title, style="dim", no_wrap=True)]
        for row in draw_load_map(windows, shades=shades, even=even):
            text = Text(row, no_wrap=True)
            for place, character in enumerate(row):
                # Not the label: it is left of the map's edge.
                if place > row.index("|") and character in shades and character != even:
                    below = shades.index(character) < shades.index(even)
                    text.stylize(_BELOW if below else _ABOVE, place, place + 1)
            lines.append(text)
        return lines


def _by_number(layer: str) -> list[tuple[int, str]]:
    """Workers tell of their layers in any order; `blocks.2` comes before `blocks.10`."""
    return [(int(p) if p.isdigit() else 0, p) for p in re.split(r"(\d+)", layer)]
