"""Steps that begin before the one before is agreed on give the numbers of those that wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepopt.config import JobConfig
from support.worker_processes import Outcome, commit, losses_of, make_plan, tiny_job, train

STEPS = 7
FOUR = {"boundaries": (0, 2, 4, 6), "pipeline_size": 4}
PLACES = [
    pytest.param(FOUR, id="1f1b-4"),
    pytest.param({"placement": "mirror", "schedule": "bi_stream", **FOUR}, id="mirror-4"),
    pytest.param(
        {"placement": "v", "schedule": "zb_v", **FOUR, "pipeline_size": 2}, id="zb-v-2"
    ),
    pytest.param({"schedule": "zb_h2", **FOUR}, id="zb-h2-4"),
]


# With so high a learning rate the norm is below 3, jumps above it in step 4, and falls again.
CLIP_STEP_4 = 3.0
JUMPY = {"learning_rate": 0.1}


def job_of(*, overlap: bool, **sections: Any) -> JobConfig:
    return tiny_job(
        training={"grad_clip": CLIP_STEP_4},
        optimizer=JUMPY,
        pipeline={"overlap_steps": overlap},
        checkpoint={"every": 0},
        **sections,
    )


def trained(job: JobConfig, run_dir: Path, **where: Any) -> Outcome:
    run_dir.mkdir(exist_ok=True)
    outcome = train(job, make_plan(job, **where), run_dir=run_dir, last_step=STEPS)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    return outcome


def steps_that(report_says: str, outcome: Outcome) -> list[int]:
    return [report.step for report in outcome.reports if report.scalars[report_says]]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return trained(job_of(overlap=False), tmp_path_factory.mktemp("waiting")).losses


@pytest.mark.parametrize("where", PLACES)
def test_what_is_taken_back_leaves_no_trace(
    where: dict[str, Any], waiting: list[float], tmp_path: Path
) -> None:
    outcome = trained(job_of(overlap=True), tmp_path, **where)
    assert outcome.losses == waiting
    assert steps_that("ran_ahead", outcome) == [2, 3, 4, 5, 6]
    assert steps_that("rolled_back", outcome) == [4]


def test_bf16_weights_come_back_with_their_masters(tmp_path: Path) -> None:
    bf16 = {"precision": {"dtype": "bfloat16"}}
    outcome = trained(job_of(overlap=True, **bf16), tmp_path, **FOUR)
    assert outcome.losses == trained(job_of(overlap=False, **bf16), tmp_path).losses
    assert steps_that("rolled_back", outcome) == [4]


def test_nothing_runs_ahead_over_a_checkpoint(tmp_path: Path) -> None:
    job = tiny_job(
        training={"grad_clip": None},
        pipeline={"overlap_steps": True},
        checkpoint={"every": 3},
    )
    plan = make_plan(job, **FOUR)
    outcome = trained(job, tmp_path, **FOUR)
    alone = trained(job, tmp_path / "alone").losses
    assert outcome.losses == alone
    assert steps_that("ran_ahead", outcome) == [
        2,
        4,
        5,
    ]  # step 1 has no step before it to judge by
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path)
    more = train(
        job,
        plan,
        run_dir=tmp_path,
        start_step=STEPS,
        last_step=STEPS + 2,
        checkpoint=checkpoint,
        generation=2,
    )
    (tmp_path / "more").mkdir()
    unbroken = losses_of(job, plan, run_dir=tmp_path / "more", last_step=STEPS + 2)
    assert outcome.losses + more.losses == unbroken
