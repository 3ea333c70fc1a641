"""A validation set through the pipeline: the same bits on every placement, and those of plain PyTorch;
training does not notice it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepopt.checkpoint.export import export_weights
from deepopt.config import JobConfig
from deepopt.convert import build_chain, describe, find_loss
from deepopt.datasets.evaluation import evaluation_batches
from support.worker_processes import Outcome, commit, make_plan, tiny_job, train

STEPS = 3
HF = "support.transformers_models"


def val_losses(outcome: Outcome) -> list[float | None]:
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    return [report.scalars.get("val_loss") for report in outcome.reports]


def built_in(**sections: Any) -> JobConfig:
    """With dropout and router noise, which an evaluation has not."""
    return tiny_job(
        evaluation={"files": [argparse.__file__], "every": 2, "microbatches": 5}, **sections
    )


def encoder_decoder() -> JobConfig:
    """Recorded, with dropout between layers."""
    return JobConfig.model_validate(
        {
            "model": {"factory": f"{HF}:t5", "kwargs": {"dropout": 0.2}},
            "data": {"dataset": f"{HF}:Batches", "kwargs": {"kind": "pairs"}},
            "evaluation": {
                "dataset": f"{HF}:Batches",
                "kwargs": {"kind": "pairs"},
                "microbatches": 5,
            },
            "training": {"microbatches": 4, "microbatch_size": 2},
            "logging": {"peak_flops": 1e9},
        }
    )


def plain(job: JobConfig, weights: Path) -> float:
    """The mean loss in one process, by the model itself."""
    model = build_chain(job, device="cpu").model
    model.load_state_dict(load_file(weights))
    loss = find_loss(job, model)
    batches = evaluation_batches(job, run_dir=None)
    losses = []
    threads = torch.get_num_threads()
    torch.set_num_threads(job.worker.threads)
    model.eval()
    with torch.no_grad():
        for number in range(batches.num_microbatches):
            inputs, targets = batches.batch(1, number)
            output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
            losses.append(float(loss(output, targets)))
    torch.set_num_threads(threads)
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("job", "names"),
    [
        pytest.param(built_in(), ("alone", "mirror", "v", "replicas"), id="built-in"),
        pytest.param(encoder_decoder(), ("alone", "mirror"), id="t5"),
    ],
)
def test_the_validation_loss_is_that_of_plain_pytorch_on_every_placement(
    job: JobConfig, names: tuple[str, ...], tmp_path: Path
) -> None:
    num_layers = len(describe(job).layers)
    plans = {
        "alone": make_plan(job),
        "mirror": make_plan(
            job,
            placement="mirror",
            schedule="bi_stream",
            boundaries=(0, 2, num_layers // 2),
            pipeline_size=3,
        ),
        "v": make_plan(
            job, placement="v", schedule="zb_v", boundaries=(0, 1, 3, 5), pipeline_size=2
        ),
        "replicas": make_plan(job, boundaries=(0, 3), pipeline_size=2, data_size=2),
    }
    found = {}
    for name in names:
        plan = plans[name]
        outcome = train(job, plan, run_dir=tmp_path / name, last_step=STEPS)
        found[name] = (val_losses(outcome), outcome.losses)
        if name == "mirror":
            checkpoint = commit(outcome, job, plan, run_dir=tmp_path / name)
            (weights,) = export_weights(checkpoint, describe(job), tmp_path / "final")
    assert all(found[name] == found["alone"] for name in names)
    losses = found["alone"][0]
    assert [loss is not None for loss in losses] == [
        False,
        job.evaluation.every == 2,
        True,
    ]
    assert losses[-1] == plain(job, weights)


def test_training_does_not_notice_evaluations(tmp_path: Path) -> None:
    job = built_in(pipeline={"overlap_steps": True}, training={"grad_clip": 5.0})
    without = tiny_job(pipeline={"overlap_steps": True}, training={"grad_clip": 5.0})
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", boundaries=(0, 4), pipeline_size=2
    )
    evaluated = train(job, plan, run_dir=tmp_path / "with", last_step=4)
    trained = train(without, plan, run_dir=tmp_path / "without", last_step=4)
    assert evaluated.losses == trained.losses
    assert [loss is not None for loss in val_losses(evaluated)] == [False, True, False, True]
