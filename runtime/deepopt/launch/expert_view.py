"""How evenly the experts of a run are loaded, from its run directory alone."""

from __future__ import annotations

from typing import Any

from deepopt.head.expert_report import expert_report
from deepopt.head.load_forecast import LoadForecast
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json_lines


def read_expert_report(run: RunDirectory) -> dict[str, Any] | None:
    """As `report.json` has it at the end, but at any time; None for a model without experts.

    Raises:
        RunDirectoryError: a file is damaged.
    """
    loads = read_json_lines(run.expert_loads)
    forecast = LoadForecast()
    for record in loads:
        for layer, tokens in record["loads"].items():
            forecast.add(layer, tokens, first_step=record["first_step"], step=record["step"])
    return expert_report(
        read_json_lines(run.metrics),
        loads,
        forecast=forecast.all_shares(),
        errors=forecast.errors(),
    )
