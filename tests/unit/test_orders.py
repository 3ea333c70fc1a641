"""Searched orders on the disk: read as they were written; what is damaged is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.decide import Planned, make_plan
from deepopt.planner.orders import known_orders, load_schedule, write_orders
from deepopt.schedule.builders import build
from support.head_fakes import make_skeleton


@pytest.fixture
def planned() -> Planned:
    job = JobConfig.model_validate(
        {"pipeline": {"placement": "mirror"}, "training": {"microbatches": 8}}
    )
    found = make_plan(job, make_skeleton("abcd"), num_workers=4, plan_id=1, effort=50_000)
    assert found.plan.orders, "the search beats the builder here"
    return found


def written(planned: Planned, folder: Path) -> Path:
    write_orders(folder, orders=planned.orders)
    (path,) = folder.iterdir()
    return path


def test_an_order_is_read_as_it_was_written(planned: Planned, tmp_path: Path) -> None:
    written(planned, tmp_path / "schedules")
    found = load_schedule(planned.plan, data_index=0, folder=tmp_path / "schedules")
    assert found == planned.schedules[0]


def searched_again(planned: Planned, folder: Path, **pipeline: Any) -> Planned:
    job = JobConfig.model_validate(
        {"pipeline": {"placement": "mirror", **pipeline}, "training": {"microbatches": 8}}
    )
    return make_plan(
        job,
        make_skeleton("abcd"),
        num_workers=4,
        plan_id=2,
        effort=50_000,
        known=known_orders(folder),
    )


def test_an_order_whose_inputs_are_the_same_is_not_searched_again(
    planned: Planned, tmp_path: Path
) -> None:
    """A slower order under the key is taken as it is: so nothing was searched."""
    (key,) = planned.plan.orders
    kept = planned.orders[key]
    slow = build(
        "gpipe" if kept.schedule.placement.up is None else "bi_stream",
        placement=kept.schedule.placement,
        directions=kept.schedule.directions,
    )
    write_orders(tmp_path, orders={key: replace(kept, schedule=slow)})
    again = searched_again(planned, tmp_path)
    assert again.schedules == (slow,)
    other = searched_again(planned, tmp_path, overlap_steps=True)
    assert other.plan.orders != (key,)


def test_what_was_kept_comes_back_whole(planned: Planned, tmp_path: Path) -> None:
    write_orders(tmp_path, orders=planned.orders)
    known = known_orders(tmp_path)
    assert {key: known(key) for key in planned.orders} == planned.orders
    assert known("elsewhere") is None
    assert searched_again(planned, tmp_path).schedules == planned.schedules


def test_a_damaged_order_is_searched_again(planned: Planned, tmp_path: Path) -> None:
    path = written(planned, tmp_path)
    path.write_text(path.read_text().replace("0F0", "0F1"))
    assert searched_again(planned, tmp_path).schedules == planned.schedules


def test_a_builders_order_needs_no_file(tmp_path: Path) -> None:
    job = JobConfig.model_validate({"pipeline": {"schedule": "1f1b"}})
    named = make_plan(job, make_skeleton("abcd"), num_workers=2, plan_id=1)
    folder = tmp_path / "schedules"
    write_orders(folder, orders=named.orders)
    assert not folder.exists()
    assert load_schedule(named.plan, data_index=0, folder=folder) == named.schedules[0]


def cut_short(content: dict[str, Any]) -> None:
    content["rows"][0] = content["rows"][0].rpartition(" ")[0]


def other_microbatches(content: dict[str, Any]) -> None:
    content["directions"].pop()


def no_rows(content: dict[str, Any]) -> None:
    del content["rows"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, "its digest does not fit its rows"),
        (other_microbatches, "no order of 8 micro-batches of this plan"),
        (no_rows, "rows"),
    ],
)
def test_a_damaged_order_is_refused_with_the_next_step(
    planned: Planned, tmp_path: Path, damage: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = written(planned, tmp_path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=reason) as error:
        load_schedule(planned.plan, data_index=0, folder=tmp_path)
    assert "deepopt resume" in error.value.remedy


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_file_that_is_gone_or_no_json_is_refused(
    planned: Planned, tmp_path: Path, content: str | None
) -> None:
    path = written(planned, tmp_path)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(PlanError, match="cannot be used"):
        load_schedule(planned.plan, data_index=0, folder=tmp_path)


def test_a_plan_of_an_older_run_directory_names_no_orders(planned: Planned) -> None:
    fields = planned.plan.to_json()
    del fields["orders"]
    fields["schedule"] = "bi_stream"
    assert type(planned.plan).from_json(fields).orders == ()


def test_an_order_on_ranks_in_other_places_comes_back_whole(tmp_path: Path) -> None:
    job = JobConfig.model_validate(
        {
            "pipeline": {"placement": "line"},
            "training": {"microbatches": 8},
            "worker": {"device": "emulated"},
            "emulation": {
                "forward_ms": [4, 1, 1, 4],
                "input_ms": [4, 1, 1, 4],
                "weight_ms": [4, 1, 1, 4],
                "rank_factor": [1, 1, 4],
            },
        }
    )
    found = make_plan(job, make_skeleton("abcd"), num_workers=3, plan_id=1, effort=20_000)
    assert found.plan.order
    write_orders(tmp_path, orders=found.orders)
    known = known_orders(tmp_path)
    assert {key: known(key) for key in found.orders} == found.orders
    assert load_schedule(found.plan, data_index=0, folder=tmp_path) == found.schedules[0]
