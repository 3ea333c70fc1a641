"""`deepopt evaluate` becomes a job that begins with the run's checkpoint and trains nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt.config import JobConfig
from deepopt.errors import InputError
from deepopt.trainer.evaluate_run import evaluation_of, job_of_evaluation
from deepopt_cli.app import app

TEXT = argparse.__file__


def make_job(**sections: Any) -> JobConfig:
    return JobConfig.model_validate(sections)


def test_the_job_trains_and_saves_nothing_and_keeps_the_placement() -> None:
    run = make_job(
        evaluation={"files": [TEXT], "every": 5},
        parallel={"pipeline": 2, "data": 2},
        worker={"count": 4},
        pipeline={"boundaries": [0, 2]},
        checkpoint={"every": 10, "directory": "elsewhere"},
        logging={"trace_steps": [3]},
    )
    data = evaluation_of(run, files=())
    job = job_of_evaluation(run, evaluation=data, step=7, workers=None)
    assert (job.training.steps, job.evaluation.alone, job.evaluation.every) == (8, True, 0)
    assert (job.checkpoint.every, job.checkpoint.directory) == (0, None)
    assert job.logging.trace_steps == ()
    assert (job.parallel, job.pipeline.boundaries) == (run.parallel, (0, 2))
    fewer = job_of_evaluation(run, evaluation=data, step=7, workers=1)
    assert (fewer.worker.count, fewer.parallel.pipeline, fewer.parallel.data) == (1, None, 1)
    assert fewer.pipeline.boundaries is None


def test_other_text_takes_the_place_of_the_runs_own_whole() -> None:
    run = make_job(evaluation={"files": [TEXT], "microbatches": 3})
    assert evaluation_of(run, files=()).microbatches == 3
    other = evaluation_of(run, files=("a.txt",))
    assert (other.files, other.microbatches, other.alone) == (("a.txt",), None, True)


@pytest.mark.parametrize(
    ("sections", "files", "message"),
    [
        ({}, (), "no evaluation data of its own"),
        ({"data": {"dataset": "a:b"}}, ("a.txt",), "this run reads a:b"),
    ],
)
def test_data_that_are_not_there_are_refused(
    sections: Any, files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        evaluation_of(make_job(**sections), files=files)


def test_a_folder_that_is_no_run_is_one_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "does not exist" in result.output
