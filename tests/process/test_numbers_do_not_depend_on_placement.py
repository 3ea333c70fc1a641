"""Losses and gradient norms are those of one process, bit for bit, wherever layers live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepopt.convert import describe
from deepopt.planner import decide
from deepopt.planner.orders import write_orders
from deepopt.planner.shapes import SHAPES, Shape
from deepopt.run_directory import RunDirectory
from support.worker_processes import losses_of, make_plan, tiny_job

STEPS = 3


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job = tiny_job()
    return losses_of(
        job, make_plan(job), run_dir=tmp_path_factory.mktemp("run"), last_step=STEPS
    )


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(
            {"schedule": "gpipe", "boundaries": (0, 4), "pipeline_size": 2}, id="gpipe-2"
        ),
        pytest.param({"boundaries": (0, 1, 6), "pipeline_size": 3}, id="1f1b-3-uneven"),
        pytest.param({"boundaries": (0, 2, 4, 6), "pipeline_size": 4}, id="1f1b-4"),
        pytest.param(
            {
                "placement": "mirror",
                "schedule": "bi_stream",
                "boundaries": (0, 2, 5),
                "pipeline_size": 3,
            },
            id="mirror-3",
        ),
        pytest.param(
            {
                "placement": "mirror",
                "schedule": "bi_stream",
                "boundaries": (0, 2, 4, 6),
                "pipeline_size": 4,
            },
            id="mirror-4",
        ),
        pytest.param(
            {
                "placement": "v",
                "schedule": "zb_v",
                "boundaries": (0, 2, 4, 6),
                "pipeline_size": 2,
            },
            id="zb-v-2",
        ),
        pytest.param(
            {"boundaries": (0, 4), "pipeline_size": 2, "data_size": 2}, id="two-replicas"
        ),
        pytest.param(
            {
                "boundaries": (0, 2, 5),
                "pipeline_size": 3,
                "order": (2, 1, 0),
                "recompute": (1, 2, 5),
            },
            id="1f1b-3-other-ranks-some-recomputed",
        ),
        pytest.param(
            {
                "placement": "v",
                "schedule": "zb_v",
                "boundaries": (0, 1, 2, 4, 5, 6),
                "pipeline_size": 3,
                "order": (0, 2, 1),
                "recompute": (0, 6),
            },
            id="zb-v-3-other-ranks-some-recomputed",
        ),
        pytest.param(
            {
                "placement": "mirror",
                "schedule": "bi_stream",
                "boundaries": (0, 2, 5),
                "pipeline_size": 3,
                "order": (1, 2, 0),
                "recompute": (3,),
            },
            id="mirror-3-other-ranks-some-recomputed",
        ),
    ],
)
def test_losses_equal_those_of_one_process(
    where: dict[str, Any], one_process: list[float], tmp_path: Path
) -> None:
    job = tiny_job()
    losses = losses_of(job, make_plan(job, **where), run_dir=tmp_path, last_step=STEPS)
    assert losses == one_process


def test_sockets_in_the_place_of_shared_memory_change_no_bit(
    one_process: list[float], tmp_path: Path
) -> None:
    job = tiny_job(pipeline={"same_host": "sockets"})
    plan = make_plan(job, boundaries=(0, 4), pipeline_size=2, data_size=2)
    assert losses_of(job, plan, run_dir=tmp_path, last_step=STEPS) == one_process


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[5]], ids=str)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_searched_orders_change_no_bit(
    shape: Shape, recompute: str, one_process: list[float], tmp_path: Path
) -> None:
    stages = shape.place(2).num_stages
    boundaries = [0, 2, 4, 6][
        :stages
    ]  # line x2 and v cut alike: the placement tells them apart
    job = tiny_job(
        pipeline={
            "placement": str(shape.kind),
            "boundaries": boundaries,
            "recompute": recompute,
        }
    )
    planned = decide.make_plan(job, describe(job), num_workers=2, plan_id=1, effort=20_000)
    assert planned.comparison is not None
    assert planned.comparison.best.shape == shape
    run = RunDirectory(tmp_path)
    write_orders(run.schedules, orders=planned.orders)
    assert losses_of(job, planned.plan, run_dir=tmp_path, last_step=STEPS) == one_process


def test_recomputation_changes_no_bit(one_process: list[float], tmp_path: Path) -> None:
    job = tiny_job(pipeline={"recompute": "full"})
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", boundaries=(0, 4), pipeline_size=2
    )
    assert losses_of(job, plan, run_dir=tmp_path, last_step=STEPS) == one_process


def test_mirrored_replicas_of_four_groups_equal_one_process(tmp_path: Path) -> None:
    job = tiny_job()
    alone = losses_of(job, make_plan(job, num_groups=4), run_dir=tmp_path, last_step=STEPS)
    plan = make_plan(
        job,
        placement="mirror",
        schedule="bi_stream",
        boundaries=(0, 4),
        pipeline_size=2,
        data_size=2,
        num_groups=4,
    )
    assert losses_of(job, plan, run_dir=tmp_path, last_step=STEPS) == alone


def test_bf16_with_fp32_masters_does_not_depend_on_placement(tmp_path: Path) -> None:
    job = tiny_job(precision={"dtype": "bfloat16"})
    alone = losses_of(job, make_plan(job), run_dir=tmp_path, last_step=STEPS)
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", boundaries=(0, 4), pipeline_size=2
    )
    assert losses_of(job, plan, run_dir=tmp_path, last_step=STEPS) == alone


def test_the_number_of_groups_is_part_of_the_numbers(
    one_process: list[float], tmp_path: Path
) -> None:
    """Guards the tests above: sums in another order do differ, so equality means something."""
    job = tiny_job()
    other = losses_of(job, make_plan(job, num_groups=4), run_dir=tmp_path, last_step=STEPS)
    assert other[0] == one_process[0]
    assert other != one_process
