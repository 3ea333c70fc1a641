"""Expert loads of a job in words. From plain JSON data to text, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def expert_lines(experts: Mapping[str, Any]) -> list[str]:
    """How evenly experts were loaded, with a map of one layer.

    Args:
        experts: the section `experts` of `report.json`.
    """
    first, last, worst = experts["first"], experts["last"], experts["worst"]
    lines = [
        f"experts     MaxVio {first['max_vio']:.2f} in step {experts['first_step']}, "
        f"at most {worst['max_vio']:.2f} (step {worst['step']}), "
        f"{last['max_vio']:.2f} at the end, mean of {experts['num_routers']} layers "
        f"(about {last['max_vio_unbiased']:.2f} without bias)",
        f"            busiest device {last['straggler_factor']:.2f}x the mean, gate mass lost "
        f"{100 * last['gate_mass_lost']:.1f} %, {last['dead_experts']:.0f} dead experts",
    ]
    if error := experts.get("forecast_error"):
        lines.append(f"            load forecast off by {forecast_words(error)}")
    if experts.get("load_map"):
        lines.append(
            f"            load of each expert of {experts['layer']} over the steps "
            "('=' even, '@' twice as much, ' ' none)"
        )
        lines += [f"  {line}" for line in experts["load_map"]]
    return lines


def forecast_words(errors: Mapping[Any, float]) -> str:
    """Errors of earlier forecasts by horizon, in words."""
    return ", ".join(
        f"{100 * value:.1f} % over {steps} steps" for steps, value in errors.items()
    )
