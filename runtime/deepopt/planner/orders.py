"""Searched orders on the disk: one JSON file an order in the run directory, checked when it is read.

A plan names a builder's order by its name, and a searched one by the key of its file. Workers read the
files, so the orders they run are the ones that were planned, whatever version searched them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepopt.errors import DeepoptError, PlanError
from deepopt.planner.plan import Plan
from deepopt.schedule.builders import build
from deepopt.schedule.ir import Schedule, parse_action
from deepopt.schedule.verify import verify
from deepopt.telemetry.files import read_json, write_json_atomic

_FORMAT = 1


def input_key(inputs: Mapping[str, Any]) -> str:
    """The name of what follows from some inputs alone.

    Args:
        inputs: JSON-ready data.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def write_orders(folder: Path, *, plan: Plan, schedules: tuple[Schedule, ...]) -> None:
    """Write the orders that a plan refers to, durably; those that are there already stay.

    Args:
        folder: of the run directory; made where it is missing.
        plan: names the files.
        schedules: of each replica.
    """
    for key, schedule in dict(zip(plan.orders, schedules, strict=False)).items():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [" ".join(map(str, row)) for row in schedule.actions]
        content = {
            "format": _FORMAT,
            "name": schedule.name,
            "placement": schedule.placement.kind,
            "stages": schedule.placement.num_stages,
            "directions": list(schedule.directions),
            "rows": rows,
            "digest": _digest(rows),
        }
        write_json_atomic(folder / f"{key}.json", content, durable=True)


def load_schedule(plan: Plan, *, data_index: int, folder: Path) -> Schedule:
    """The order of a replica: built by name, or read and verified.

    Args:
        plan: names it.
        data_index: which replica.
        folder: where searched orders are.

    Raises:
        PlanError: the file is missing or damaged, or made for another plan.
    """
    placement, directions = plan.make_placement(), plan.directions(data_index)
    if not plan.orders:
        return build(plan.schedule, placement=placement, directions=directions)
    path = folder / f"{plan.orders[data_index]}.json"
    try:
        content = read_json(path)
        rows = content["rows"]
        if content["digest"] != _digest(rows):
            raise ValueError("its digest does not fit its rows")
        if tuple(content["directions"]) != directions or content["stages"] != plan.num_stages:
            raise ValueError(f"it is no order of {len(directions)} micro-batches of this plan")
        schedule = Schedule(
            name=content["name"],
            placement=placement,
            directions=directions,
            actions=tuple(tuple(map(parse_action, row.split())) for row in rows),
        )
        verify(schedule)
    except (ValueError, KeyError, TypeError, AttributeError, DeepoptError) as problem:
        text = problem.message if isinstance(problem, DeepoptError) else str(problem)
        raise PlanError(
            f"the searched order {path} cannot be used: {text}",
            remedy="deepopt resume RUN_DIR searches it again; or set pipeline.schedule to the "
            "name of a builder",
        ) from problem
    return schedule


def _digest(rows: list[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
