"""Forwards alone over real workers: outputs and losses have the bits and the order of plain PyTorch, every
sample counts once, wherever the layers are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, default_collate

from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.trainer.data import Data, Reading, read_evaluation, read_prediction
from deepopt.trainer.job import Settings, job_of
from deepopt.worker.predictions import read_predictions
from support import transformers_models as hf
from support.worker_processes import Outcome, make_plan, train

SAMPLES, SIZE = 19, 4  # the last of five micro-batches has three


class Features(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        source, target = (torch.randn(n, 24, generator=generator) for n in (6, 5))
        return (source, target), target.flip(0)


class Tokens(Dataset[Any]):
    """With targets beside the inputs, or without any."""

    def __init__(self, *, targets: bool) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, hf.VOCABULARY, (13,), generator=generator)
        inputs = {"input_ids": ids[:-1]}
        return (inputs, ids[1:]) if self.targets else inputs


class Labelled(Tokens):
    def __getitem__(self, index: int) -> Any:
        ids = super().__getitem__(index)["input_ids"]
        return {"input_ids": ids, "labels": ids}


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


def cross_entropy(output: Any, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), targets.flatten())


def make_job(
    model: torch.nn.Module, data: Data, folder: Path, *, outputs: bool, loss_fn: Any
) -> JobConfig:
    settings = Settings(
        device_map=None, workers=None, placement="auto", elb={}, loss_fn=loss_fn, optimizer=None,
        optimizer_kwargs=None, lr_scheduler=None, lr_scheduler_kwargs=None, grad_clip=None,
        groups=None, name="test", hostfile=None, address=None,
        overrides={"logging": {"peak_flops": 1e9}},
    )  # fmt: skip
    folder.mkdir()
    return job_of(
        model, data, settings, steps=1, folder=folder, validation=data, alone=True, outputs=outputs
    )  # fmt: skip


def forward(job: JobConfig, run_dir: Path, *, name: str) -> Outcome:
    middle = len(describe(job).layers) // 2
    plans: dict[str, dict[str, Any]] = {
        "mirror": {"placement": "mirror", "schedule": "bi_stream"},
        "replicas": {"data_size": 2, "boundaries": (0,), "pipeline_size": 1},
    }
    plan = make_plan(job, **{"boundaries": (0, middle), "pipeline_size": 2, **plans[name]})
    return train(job, plan, run_dir=run_dir, last_step=1)


def plainly(model: torch.nn.Module, dataset: Any) -> list[Any]:
    """The outputs of micro-batches in order, the last one filled up with its last sample."""
    torch.set_num_threads(1)  # as the workers
    model.eval()
    found = []
    for first in range(0, SAMPLES, SIZE):
        rows = [dataset[min(i, SAMPLES - 1)] for i in range(first, first + SIZE)]
        inputs = default_collate([r[0] if isinstance(r, tuple) else r for r in rows])
        with torch.no_grad():
            found.append(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
    return found


def plain_loss(outputs: list[Any], dataset: Any, loss_fn: Any, cut: Any) -> float:
    total = []
    for number, output in enumerate(outputs):
        own = range(number * SIZE, min(SAMPLES, (number + 1) * SIZE))
        targets = torch.stack([dataset[index][1] for index in own])
        total.append(float(loss_fn(cut(output, len(own)), targets)) * len(own))
    return math.fsum(total) / SAMPLES


def cut_logits(output: Any, count: int) -> Any:
    output.logits = output.logits[:count]
    return output


@pytest.mark.parametrize("name", ["mirror", "replicas"])
@pytest.mark.parametrize("kind", ["tensor", "dataclass"])
def test_outputs_and_losses_are_those_of_plain_pytorch(
    kind: str, name: str, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = hf.transformer() if kind == "tensor" else hf.llama()
    measured = Features() if kind == "tensor" else Tokens(targets=True)
    asked = measured if kind == "tensor" else Tokens(targets=False)
    reading = Reading(batch_size=2 * SIZE, microbatches=2, shuffle=True, drop_last=True)
    plain = plainly(model, asked)

    data = read_prediction(asked, model=model, reading=reading)
    job = make_job(model, data, tmp_path / "predict", outputs=True, loss_fn=None)
    outcome = forward(job, tmp_path, name=name)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    found = read_predictions(tmp_path / "predictions", num_microbatches=5)
    logits = [out if kind == "tensor" else out.logits for out in plain]
    values = found if kind == "tensor" else found.logits
    assert type(found) is type(plain[0])
    assert torch.equal(values, torch.cat(logits)[:SAMPLES])

    loss_fn = mean_square if kind == "tensor" else None
    data = read_evaluation(measured, model=model, reading=reading)
    job = make_job(model, data, tmp_path / "evaluate", outputs=False, loss_fn=loss_fn)
    outcome = forward(job, tmp_path, name=name)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    cut = cut_logits if kind == "dataclass" else lambda output, count: output[:count]
    expected = plain_loss(plain, measured, loss_fn or cross_entropy, cut)
    assert [report.scalars["val_loss"] for report in outcome.reports] == [expected]
    assert not outcome.shards


def test_a_loss_that_the_model_computes_itself_cannot_leave_samples_out(tmp_path: Path) -> None:
    model = hf.llama()
    reading = Reading(batch_size=2 * SIZE, microbatches=2)
    data = read_evaluation(Labelled(targets=False), model=model, reading=reading)
    job = make_job(model, data, tmp_path / "evaluate", outputs=False, loss_fn=None)
    outcome = forward(job, tmp_path, name="replicas")
    failure = next(f for f in outcome.failures.values() if f.kind != "peer")
    assert "the last one has 3 of 4 samples" in failure.message
    assert failure.exit_code == 1
