"""A job may bring its own order along: it is kept in the run directory, and refused where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt.config import JobConfig
from deepopt.errors import DeepoptError, PlanError
from deepopt.job_file import load_job, make_job
from deepopt.launch.preparation import prepare, with_absolute_paths
from deepopt.launch.run_files import write_plan
from deepopt.planner.decide import make_plan
from deepopt.planner.orders import load_schedule
from deepopt.run_directory import RunDirectory
from deepopt.schedule.builders import build
from deepopt.schedule.csv_order import to_csv
from deepopt.schedule.ir import PlacementKind, Schedule, directions_of, place
from deepopt_cli.app import app
from support.head_fakes import make_skeleton


def order(
    name: str, kind: PlacementKind, *, ranks: int = 2, sizes: tuple[int, ...] = (2, 2)
) -> Schedule:
    placement = place(kind, num_ranks=ranks)
    directions = directions_of(sizes, num_directions=placement.num_directions)
    return build(name, placement=placement, directions=directions)


def job(**changes: Any) -> JobConfig:
    pipeline = {"schedule": "file:order.csv", **changes.pop("pipeline", {})}
    return JobConfig.model_validate(
        {"pipeline": pipeline, "training": {"microbatches": 4}, **changes}
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an order."""
    monkeypatch.chdir(tmp_path)
    text = to_csv(order("zb_h1", PlacementKind.LINE), transfers=False)
    (tmp_path / "order.csv").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "stages"),
    [
        ("zb_h1", PlacementKind.LINE, 2),
        ("zb_v", PlacementKind.V, 4),
        ("bi_stream", PlacementKind.MIRROR, 2),
    ],
)
def test_a_plan_takes_the_placement_of_the_order(
    name: str, kind: PlacementKind, stages: int
) -> None:
    given = order(name, kind)
    planned = make_plan(job(), make_skeleton("abcd"), num_workers=2, plan_id=1, given=given)
    assert (planned.plan.placement, planned.plan.num_stages) == (kind, stages)
    assert planned.schedules == (given,)
    assert len(planned.plan.orders) == 1


def test_every_replica_runs_the_order() -> None:
    given = order("1f1b", PlacementKind.LINE, sizes=(2,))
    planned = make_plan(
        job(parallel={"data": 2}), make_skeleton("ab"), num_workers=4, plan_id=1, given=given
    )
    assert planned.schedules == (given, given)
    assert len(planned.plan.orders) == 2


@pytest.mark.parametrize(
    ("changes", "workers", "message"),
    [
        ({}, 3, "order.csv is for 2 ranks, a pipeline of this job has 3"),
        (
            {"pipeline": {"placement": "v"}},
            2,
            "order.csv is for placement line, the job asks for pipeline.placement v",
        ),
        (
            {"training": {"microbatches": 6}},
            2,
            "is for 4 micro-batches that go down, replica 0 of this job has 6 micro-batches",
        ),
        (
            {"pipeline": {"boundaries": [0, 1, 2, 3]}},
            2,
            "is for 2 stages, pipeline.boundaries cuts 4",
        ),
    ],
)
def test_an_order_that_does_not_fit_the_job_is_refused(
    changes: dict[str, Any], workers: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(
            job(**changes),
            make_skeleton("abcd"),
            num_workers=workers,
            plan_id=1,
            given=order("1f1b", PlacementKind.LINE),
        )


def test_a_mirror_order_with_other_directions_is_refused() -> None:
    given = order("bi_stream", PlacementKind.MIRROR, sizes=(1, 3))
    with pytest.raises(PlanError, match=r"that go duuu .* that go dduu"):
        make_plan(job(), make_skeleton("abcd"), num_workers=2, plan_id=1, given=given)


SMALL = {
    "training": {"microbatches": 4},
    "worker": {"count": 2},
}


def test_a_run_keeps_its_order_and_needs_the_file_no_more(here: Path) -> None:
    given = make_job({**SMALL, "pipeline": {"schedule": "file:order.csv"}})
    prepared = prepare(with_absolute_paths(given), plan_id=1)
    run = RunDirectory(here / "run")
    run.root.mkdir()
    write_plan(run, prepared)
    (here / "order.csv").unlink()
    for plan_id in (2, 3):  # a resumed run is resumed again
        again = prepare(with_absolute_paths(load_job(run.job, ())), plan_id=plan_id)
        assert again.planned.schedules == prepared.planned.schedules
        assert again.plan.schedule == "order"
        write_plan(run, again)
    loaded = load_schedule(prepared.plan, data_index=0, folder=run.schedules)
    assert loaded == prepared.planned.schedules[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n", "order.csv: rank 1: 1B0 runs before 1F0"),
        ("0F0,hello\n", "order.csv:1: 'hello' is not an action"),
        (None, "cannot read .*order.csv"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_starts(
    here: Path, text: str | None, message: str
) -> None:
    path = here / "order.csv"
    path.unlink() if text is None else path.write_text(text)
    given = make_job({**SMALL, "pipeline": {"schedule": "file:order.csv"}})
    with pytest.raises(DeepoptError, match=message):
        prepare(with_absolute_paths(given), plan_id=1)


def test_the_order_of_a_job_is_shown(here: Path) -> None:
    (here / "job.yaml").write_text(
        "pipeline: {schedule: 'file:order.csv'}\nworker: {count: 2}\ntraining: {microbatches: 4}\n"
    )
    result = CliRunner().invoke(app, ["schedule", "show", "job.yaml"])
    assert result.exit_code == 0, result.output
    assert "order, plan 1 of job.yaml" in result.stdout
