"""A job whose linear maps compute in FP8: the bits of one process wherever its layers live, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.worker_processes import losses_of, make_plan, tiny_job

STEPS = 3
FP8 = {"fp8": "blockwise", "fp8_include": ["blocks"]}  # whatever their size


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job = tiny_job(precision=FP8)
    folder = tmp_path_factory.mktemp("run")
    return losses_of(job, make_plan(job), run_dir=folder, last_step=STEPS)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(
            {
                "placement": "mirror",
                "schedule": "bi_stream",
                "boundaries": (0, 2, 5),
                "pipeline_size": 3,
                "recompute": (1, 4),
            },
            id="mirror-3-some-recomputed",
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
    ],
)
def test_losses_in_fp8_equal_those_of_one_process(
    where: dict[str, Any], one_process: list[float], tmp_path: Path
) -> None:
    job = tiny_job(precision=FP8)
    losses = losses_of(job, make_plan(job, **where), run_dir=tmp_path, last_step=STEPS)
    assert losses == one_process


def test_fp8_is_in_the_losses(one_process: list[float], tmp_path: Path) -> None:
    """Guards the test above: without FP8 they differ, from the first step on."""
    job = tiny_job()
    plain = losses_of(job, make_plan(job), run_dir=tmp_path, last_step=STEPS)
    assert plain[0] != one_process[0]
    assert plain == pytest.approx(one_process, rel=0.02)
