"""What each expert's load will be over the next 1,000 steps, and how right earlier forecasts were. Pure.

Loads fluctuate at first and become stable (arXiv:2404.16914), so the forecast is their average, the newest
steps weighing most. Each forecast is kept until its horizon has passed and then compared with what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HORIZONS = (10, 100, 1000)  # steps; the short ones tell something before 1,000 steps are over
# Steps after which a load weighs half. In two trainings (benchmarks/elb_forecast.py) 200 was better for loads
# that ELB keeps even, 50 for loads that a young model moves.
HALF_LIFE = 100


@dataclass(slots=True)
class _Pending:
    shares: tuple[float, ...]
    first_step: int
    came: list[int]


@dataclass(slots=True)
class _Layer:
    average: list[float]
    weight: float = 0.0
    last_step: int = 0
    pending: dict[int, _Pending] = field(default_factory=dict)


class LoadForecast:
    """Of all layers of a job."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self._errors: dict[int, list[float]] = {horizon: [] for horizon in HORIZONS}

    def add(self, layer: str, loads: Sequence[int], *, first_step: int, step: int) -> None:
        """Take the loads of a window.

        Args:
            layer: whose.
            loads: tokens of each expert.
            first_step: of the window; windows that were taken before are passed over.
            step: its last.
        """
        total = sum(loads)
        known = self._layers.setdefault(layer, _Layer(average=[0.0] * len(loads)))
        if total == 0 or first_step <= known.last_step or len(loads) != len(known.average):
            return
        for horizon, pending in list(known.pending.items()):
            pending.came = [a + b for a, b in zip(pending.came, loads, strict=True)]
            if step - pending.first_step + 1 >= horizon:
                self._errors[horizon].append(forecast_error(pending.shares, pending.came))
                del known.pending[horizon]
        steps = step - first_step + 1
        kept = 0.5 ** (steps / HALF_LIFE)
        known.average = [
            kept * average + (1 - kept) * load / total
            for average, load in zip(known.average, loads, strict=True)
        ]
        known.weight = kept * known.weight + (1 - kept)
        known.last_step = step
        for horizon in HORIZONS:
            if horizon not in known.pending:
                known.pending[horizon] = _Pending(
                    self.shares(layer), step + 1, [0] * len(loads)
                )

    def shares(self, layer: str) -> tuple[float, ...]:
        """The share of each expert of a layer in the choices of the next 1,000 steps; empty when
        nothing is known."""
        known = self._layers.get(layer)
        if known is None or known.weight == 0:
            return ()
        return tuple(average / known.weight for average in known.average)

    def all_shares(self) -> dict[str, tuple[float, ...]]:
        """By layer."""
        return {layer: self.shares(layer) for layer in self._layers}

    def errors(self) -> Mapping[int, float]:
        """Mean relative error of the forecasts whose horizon has passed, by horizon in steps."""
        return {h: math.fsum(found) / len(found) for h, found in self._errors.items() if found}


def forecast_error(shares: Sequence[float], loads: Sequence[int]) -> float:
    """Mean distance between the forecast and the loads that came, as a share of the mean load.

    Args:
        shares: forecast; sums to 1.
        loads: that came; not all 0.
    """
    total = sum(loads)
    return math.fsum(abs(s - n / total) for s, n in zip(shares, loads, strict=True))
