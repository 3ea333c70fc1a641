"""How evenly experts were loaded, for the closing report: from the lines in the run directory. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepopt.telemetry.load_map import draw_load_map, windows_by_layer

LAST_STEPS = 10  # whose mean is the end
FIGURES = (
    "max_vio",
    "max_vio_unbiased",
    "straggler_factor",
    "gate_mass_lost",
    "dead_experts",
    "shrunk_experts",
)


def expert_report(
    metrics: Sequence[Mapping[str, Any]],
    loads: Sequence[Mapping[str, Any]],
    *,
    forecast: Mapping[str, Sequence[float]],
    errors: Mapping[int, float],
) -> dict[str, Any] | None:
    """The section `experts` of `report.json`; None for a model without them.

    Args:
        metrics: lines of `metrics.jsonl`.
        loads: lines of `expert_loads.jsonl`.
        forecast: share of each expert in the choices of the next 1,000 steps, by layer.
        errors: mean relative error of earlier forecasts, by horizon in steps.
    """
    steps = {line["step"]: line for line in metrics if line.get("max_vio") is not None}
    if not steps:
        return None
    ordered = [steps[step] for step in sorted(steps)]
    last = ordered[-LAST_STEPS:]
    worst = max(ordered, key=lambda line: float(line["max_vio"]))
    windows = windows_by_layer(loads)
    layer = next(iter(windows), None)
    drawn = [tokens for _, tokens in windows[layer]] if layer is not None else []
    return {
        "first_step": ordered[0]["step"],
        "first": {name: ordered[0].get(name) for name in FIGURES},
        "last": {
            name: sum(float(line.get(name) or 0) for line in last) / len(last)
            for name in FIGURES
        },
        "worst": {"step": worst["step"], "max_vio": worst["max_vio"]},
        "num_routers": len(windows),
        "layer": layer,
        "load_map": draw_load_map(drawn),
        "forecast": {name: list(shares) for name, shares in forecast.items()},
        "forecast_error": {str(horizon): error for horizon, error in errors.items()},
    }
