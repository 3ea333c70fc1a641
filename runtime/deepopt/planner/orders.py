"""Searched orders on the disk: one JSON file an order in the run directory, checked when it is read.

A plan names a builder's order by its name, and a searched one by the key of its file: the hash of what
it was searched for. Workers read the files, so the orders they run are the ones that were planned, whatever
version searched them; and whoever plans again from the same inputs takes the file instead of a search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepopt.errors import DeepoptError, PlanError
from deepopt.planner.cut import Cut
from deepopt.planner.plan import Plan
from deepopt.schedule.builders import build
from deepopt.schedule.ir import (
    Direction,
    Placement,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.verify import verify
from deepopt.telemetry.files import read_json, write_json_atomic

_FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptOrder:
    """What a search found.

    Args:
        schedule: the order.
        cut: of the layers, that it was searched for; None for an order that was brought along.
        builder: the fastest builder that fits; None where none does, or none was compared with.
    """

    schedule: Schedule
    cut: Cut | None
    builder: str | None = None


Known = Callable[[str], KeptOrder | None]
"""The order of a key, where there is one."""


def input_key(inputs: Mapping[str, Any]) -> str:
    """The name of what follows from some inputs alone.

    Args:
        inputs: JSON-ready data.
    """
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def write_orders(folder: Path, *, orders: Mapping[str, KeptOrder]) -> None:
    """Write orders that were searched, durably.

    Args:
        folder: of the run directory; made where it is missing.
        orders: by the key of their file.
    """
    for key, kept in orders.items():
        folder.mkdir(parents=True, exist_ok=True)
        schedule = kept.schedule
        rows = [" ".join(map(str, row)) for row in schedule.actions]
        content = {
            "format": _FORMAT,
            "name": schedule.name,
            "placement": schedule.placement.kind,
            "stages": schedule.placement.num_stages,
            "cut": None if kept.cut is None else asdict(kept.cut),
            "builder": kept.builder,
            "directions": list(schedule.directions),
            "rows": rows,
            "digest": _digest(rows),
        }
        write_json_atomic(folder / f"{key}.json", content, durable=True)


def known_orders(folder: Path) -> Known:
    """The orders of a folder by their keys; what is missing, damaged or of another version is none.

    Args:
        folder: of a run directory; need not exist.
    """

    def known(key: str) -> KeptOrder | None:
        path = folder / f"{key}.json"
        try:
            content = read_json(path)
            placement = place(
                PlacementKind(content["placement"]),
                num_ranks=len(content["rows"]),
                stages_per_rank=max(1, content["stages"] // len(content["rows"])),
            )
            cut = Cut.from_json(content["cut"])
            if cut.order:
                placement = placement.on_ranks(cut.order)
            schedule = _parsed(content, placement)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, DeepoptError):
            return None
        if len(cut.boundaries) != placement.num_stages:
            return None
        return KeptOrder(schedule=schedule, cut=cut, builder=content.get("builder"))

    return known


def built_order(plan: Plan, *, data_index: int) -> Schedule:
    """The order of a replica by the builder that a plan names.

    Args:
        plan: names it.
        data_index: which replica.
    """
    in_places = replace(plan, order=()).make_placement()
    order = build(plan.schedule, placement=in_places, directions=plan.directions(data_index))
    return order.on_ranks(plan.order) if plan.order else order


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
        return built_order(plan, data_index=data_index)
    path = folder / f"{plan.orders[data_index]}.json"
    try:
        content = read_json(path)
        if tuple(content["directions"]) != directions or content["stages"] != plan.num_stages:
            raise ValueError(f"it is no order of {len(directions)} micro-batches of this plan")
        schedule = _parsed(content, placement)
    except (ValueError, KeyError, TypeError, AttributeError, DeepoptError) as problem:
        text = problem.message if isinstance(problem, DeepoptError) else str(problem)
        raise PlanError(
            f"the searched order {path} cannot be used: {text}",
            remedy="deepopt resume RUN_DIR searches it again; or set pipeline.schedule to the "
            "name of a builder",
        ) from problem
    return schedule


def _parsed(content: Mapping[str, Any], placement: Placement) -> Schedule:
    """The verified order of a file."""
    rows = content["rows"]
    if content["digest"] != _digest(rows):
        raise ValueError("its digest does not fit its rows")
    schedule = Schedule(
        name=content["name"],
        placement=placement,
        directions=tuple(map(Direction, content["directions"])),
        actions=tuple(tuple(map(parse_action, row.split())) for row in rows),
    )
    verify(schedule)
    return schedule


def _digest(rows: list[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
