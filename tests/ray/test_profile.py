"""`deepopt profile` on real workers: what it finds, and what it says when one of them vanishes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt.planner.plan_text import read_plan_file
from deepopt_cli.app import app
from support.ray_jobs import TESTS

pytestmark = pytest.mark.ray

JOB = """
model: {kwargs: {num_blocks: 3, d_model: 32, num_heads: 2, expert_hidden: 16, num_experts: 4}}
training: {microbatches: 4, microbatch_size: 1}
data: {sequence_length: 16}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS)]))
    (tmp_path / "job.yaml").write_text(JOB)


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_emulated_workers_are_measured_planned_and_launched(tmp_path: Path) -> None:
    """Rank 1 takes twice the time: its factor is found, and it gets fewer layers."""
    options = ("--workers", 2, "--set", "worker.device=emulated")
    options += (
        "--set",
        "emulation.rank_factor=[1.0, 2.0]",
        "--set",
        "emulation.latency_ms=1.0",
    )
    options += ("--set", "emulation.forward_ms=6.0", "--set", "pipeline.placement=line")
    result = deepopt("profile", "job.yaml", *options)
    assert result.exit_code == 0, result.output
    plan = read_plan_file((tmp_path / "plan.yaml").read_text(), source="plan.yaml")
    assert plan.source == "emulated"
    assert [d.factor for d in plan.hardware.devices] == pytest.approx([1.0, 2.0], rel=0.05)
    times, _ = plan.resolved()[1]
    assert times.forward == pytest.approx(6.0, rel=0.1)
    assert times.input == pytest.approx(22.0, rel=0.1)
    (link,) = plan.hardware.links
    assert link.latency_us == pytest.approx(1000, rel=0.6)
    stages = [plan.plan(plan_id=1).stage_layers(s) for s in range(len(plan.stages))]
    held = [
        sum(len(stages[s]) for s in range(len(stages)) if r in plan.stages[s].ranks)
        for r in (0, 1)
    ]
    assert held[0] > held[1]
    assert list((tmp_path / "runs").iterdir()) == []
    options += ("--plan", "plan.yaml", "--steps", 2, "--run-dir", "run")
    result = deepopt("launch", "job.yaml", *options)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 2


def test_workers_that_leave_no_core_find_what_else_takes_some(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    options = ("--workers", 2, "--set", f"worker.threads={max(1, cores // 2)}")
    result = deepopt("profile", "job.yaml", *options)
    assert result.exit_code == 0, result.output
    plan = read_plan_file((tmp_path / "plan.yaml").read_text(), source="plan.yaml")
    assert plan.hardware.shared_cores is not None
    (background,) = plan.hardware.background
    assert background.host == plan.hardware.devices[0].host
    assert 0 < background.processes < cores  # Ray and the head: never quite still, never all
    assert 0 < background.threads < cores


def test_a_device_that_vanishes_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    result = deepopt(
        "profile",
        "job.yaml",
        "--workers",
        2,
        "--set",
        "data.dataset=support.datasets:vanishing",
    )
    assert result.exit_code == 4, result.output
    assert "rank 1" in result.stderr
    assert not (tmp_path / "plan.yaml").exists()
