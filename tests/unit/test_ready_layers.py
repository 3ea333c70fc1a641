"""What a waiting process builds ahead: the very layers that it would build later, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.job_file import load_job
from deepopt.planner.decide import make_plan
from deepopt.planner.plan import Plan
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import write_json_atomic
from deepopt.worker.ready_layers import build_ahead, choose_layers


def small_job(*settings: str) -> JobConfig:
    return load_job(None, ["model.kwargs={num_blocks: 6, d_model: 16}", *settings])


def plan_of(job: JobConfig, *, workers: int) -> Plan:
    return make_plan(job, describe(job), num_workers=workers, plan_id=1).plan


@pytest.mark.parametrize(
    ("placement", "workers", "are_all"),
    [("mirror", 2, True), ("line", 2, True), ("line", 8, False)],
)
def test_layers_are_built_ahead_that_take_no_more_than_a_worker_has_in_training(
    placement: str, workers: int, are_all: bool
) -> None:
    job = small_job(f"pipeline.placement={placement}")
    skeleton = describe(job)
    chosen = choose_layers(plan_of(job, workers=workers), skeleton)
    assert chosen == (tuple(range(len(skeleton.layers))) if are_all else ())


@pytest.mark.parametrize("tied", ["true", "false"])
def test_layers_built_ahead_are_those_that_would_be_built(tmp_path: Path, tied: str) -> None:
    job = small_job(f"model.kwargs.tie_embeddings={tied}")
    plan = plan_of(job, workers=2)
    write_json_atomic(RunDirectory(tmp_path).plan, plan.to_json())
    ready = build_ahead(job, describe(job), run_dir=tmp_path)
    assert ready is not None
    indices = list(plan.stage_layers(1))
    taken = ready.take(indices)
    assert taken is not None
    built, _ = build_layers(job, indices, device=torch.device("cpu"))
    for ahead, fresh in zip(taken[0], built, strict=True):
        assert (ahead.name, ahead.tied) == (fresh.name, fresh.tied)
        values = {**ahead.parameters, **ahead.buffers}
        for name, value in {**fresh.parameters, **fresh.buffers}.items():
            assert torch.equal(values[name], value), name


def test_what_was_built_ahead_is_taken_once_and_the_rest_forgotten(tmp_path: Path) -> None:
    job = small_job()
    write_json_atomic(RunDirectory(tmp_path).plan, plan_of(job, workers=2).to_json())
    ready = build_ahead(job, describe(job), run_dir=tmp_path)
    assert ready is not None
    assert ready.take([0, 99]) is None
    assert ready.take([0]) is not None
    assert ready.layers == {}
    assert ready.take([1]) is None


def test_nothing_is_built_ahead_where_no_plan_says_what_workers_hold(tmp_path: Path) -> None:
    job = small_job()
    assert build_ahead(job, describe(job), run_dir=tmp_path) is None
