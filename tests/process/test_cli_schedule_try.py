"""`deepopt schedule try`: a plan on emulated devices, predicted against measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt_cli.app import app

JOB = """
model: {factory: "deepopt.models.stand_in:build", kwargs: {num_layers: 8}}
data: {dataset: "deepopt.models.stand_in:batches"}
training: {microbatches: 4}
emulation: {forward_ms: 1, input_ms: 1, weight_ms: 1, rank_factor: [1, 2], latency_ms: 2}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def tried(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["schedule", "try", *map(str, arguments)])


def test_prediction_and_measurement_stand_side_by_side(job: Path) -> None:
    result = tried(job, "--workers", 2, "--steps", 2, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["plan"]["pipeline_size"] == 2
    assert len(found["measured"]["steps_s"]) == 2
    assert found["measured"]["step_s"] >= found["predicted"]["step_s"] > 0
    for rank in found["ranks"]:
        assert rank["measured_busy_s"] == pytest.approx(rank["predicted_busy_s"])
    assert found["emulated"]["operations"] > 0


def test_people_get_a_table_of_the_ranks(job: Path) -> None:
    result = tried(
        job, "--workers", 2, "--steps", 1, "--set", "pipeline.placement=line",
        "--set", "pipeline.schedule=1f1b",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 ranks, placement line, schedule 1f1b, 4 micro-batches, 8 layers" in result.stdout
    assert "on emulated devices" in result.stdout
    assert result.stdout.splitlines()[-1].split()[0] == "1"


def test_figures_that_fit_no_plan_are_refused_before_anything_starts(job: Path) -> None:
    result = tried(job, "--workers", 4)
    assert result.exit_code == 1
    assert "rank" in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_to_try_is_one_clear_error(tmp_path: Path) -> None:
    result = tried(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
