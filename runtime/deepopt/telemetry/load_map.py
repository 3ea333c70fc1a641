"""Expert loads over steps as a picture of characters, readable without colour. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# From no tokens, over an even load, to twice as many and more.
SHADES = " .:-=+*#%@"
EVEN = "="
BLOCKS = " ▁▂▃▄▅▆▇█"  # the even one is the one in the middle
MOST_COLUMNS = 60
MOST_ROWS = 16


def draw_load_map(
    windows: Sequence[Sequence[int]], *, shades: str = SHADES, even: str = EVEN
) -> list[str]:
    """A row an expert, a column a window; rows and columns are joined until they fit.

    Args:
        windows: tokens of each expert, window after window.
        shades: characters for no load, over an even one, to twice as much.
        even: the one of them for an even load.

    Returns:
        Lines of at most 60 characters each; none without windows.
    """
    if not windows:
        return []
    columns = [_add_up(part) for part in _parts(windows, MOST_COLUMNS)]
    num_experts = len(columns[0])
    rows = []
    for experts in _parts(range(num_experts), MOST_ROWS):
        line = ""
        for column in columns:
            mean = sum(column) / num_experts
            load = sum(column[e] for e in experts) / len(experts)
            line += _shade(load / mean, shades, even) if mean else " "
        label = str(experts[0]) if len(experts) == 1 else f"{experts[0]}-{experts[-1]}"
        rows.append(f"{label:>9} |{line}|")
    return rows


def windows_by_layer(
    records: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[int, list[int]]]]:
    """(last step, tokens of each expert) of each layer's windows; replayed steps count once.

    Args:
        records: lines of `expert_loads.jsonl`.
    """
    found: dict[str, dict[int, list[int]]] = {}
    for record in records:
        for layer, loads in record["loads"].items():
            found.setdefault(layer, {})[int(record["step"])] = loads
    return {layer: sorted(windows.items()) for layer, windows in found.items()}


def _shade(ratio: float, shades: str, even: str) -> str:
    """`even` for 1, the last shade from 2 on; a load of 0 alone is blank."""
    if ratio <= 0:
        return shades[0]
    middle = shades.index(even)
    above = len(shades) - 1 - middle
    place = middle * ratio if ratio < 1 else middle + above * (ratio - 1)
    return shades[max(1, min(len(shades) - 1, round(place)))]


def _parts(values: Sequence[Any], most: int) -> list[Sequence[Any]]:
    count = min(most, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    return [values[a:b] for a, b in itertools.pairwise(edges)]


def _add_up(windows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*windows, strict=True)]
