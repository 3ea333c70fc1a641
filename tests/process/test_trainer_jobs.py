"""The jobs that DeepTrainer makes, over real workers: the bits of a plain PyTorch loop, and of one worker."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from deepopt.checkpoint.verification import Found
from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.trainer.checkpoints import load_weights
from support import transformers_models as hf
from support.trainer_jobs import make_trainer_job
from support.worker_processes import commit, losses_of, make_plan, train

STEPS = 4


class Features(Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        source, target = (torch.randn(n, 24, generator=generator) for n in (6, 5))
        return (source, target), target.flip(0)


class Tokens(Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        ids = torch.randint(
            1, hf.VOCABULARY, (12,), generator=torch.Generator().manual_seed(index)
        )
        return {"input_ids": ids, "labels": ids}


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


def plain_loop(
    model: torch.nn.Module,
    job: JobConfig,
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> list[float]:
    """What a user would write, with micro-batches as accumulated gradients."""
    torch.set_num_threads(1)  # as the workers
    source = build_batch_source(job, run_dir=None)
    count = job.training.microbatches
    losses = []
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        own = []
        for microbatch in range(count):
            inputs, targets = source.batch(step, microbatch)
            assert isinstance(inputs, Mapping)
            loss = loss_of(model(**inputs), targets)
            (loss / count).backward()
            own.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        losses.append(math.fsum(own) / count)
    return losses


@pytest.mark.parametrize(
    ("make_model", "dataset", "loss_fn"),
    [
        pytest.param(hf.transformer, Features(), mean_square, id="nn.Transformer"),
        pytest.param(hf.llama, Tokens(), None, id="llama"),
    ],
)
def test_a_line_with_one_group_has_the_bits_of_a_plain_loop(
    make_model: Callable[[], torch.nn.Module], dataset: Any, loss_fn: Any, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = make_model().train()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    job = make_trainer_job(
        model, dataset, tmp_path, steps=STEPS, microbatches=4, groups=1, grad_clip=0.5, loss_fn=loss_fn,
        optimizer=torch.optim.SGD, optimizer_kwargs={"lr": 0.1, "momentum": 0.9},
        lr_scheduler=torch.optim.lr_scheduler.StepLR, lr_scheduler_kwargs={"step_size": 2},
    )  # fmt: skip
    expected = plain_loop(
        twin, job, loss_fn or (lambda output, _: output.loss), optimizer,
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=2),
    )  # fmt: skip
    count = len(describe(job).layers)
    plan = make_plan(job, boundaries=(0, count // 2), pipeline_size=2, num_groups=1)
    outcome = train(job, plan, run_dir=tmp_path, last_step=STEPS)
    assert not outcome.failures, outcome.failures
    assert outcome.losses == expected
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path)
    from deepopt.checkpoint.layer_files import read_manifest

    load_weights(model, Found(path=checkpoint, manifest=read_manifest(checkpoint), rejected=()))
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("make_model", "dataset", "loss_fn"),
    [
        pytest.param(hf.transformer, Features(), mean_square, id="nn.Transformer"),
        pytest.param(lambda: hf.gpt2(dropout=0.1), Tokens(), None, id="gpt2-tied-dropout"),
    ],
)
def test_four_workers_in_bi_stream_have_the_bits_of_one(
    make_model: Callable[[], torch.nn.Module], dataset: Any, loss_fn: Any, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = make_model()
    job = make_trainer_job(
        model, dataset, tmp_path, steps=STEPS, microbatches=8, grad_clip=0.5, loss_fn=loss_fn,
        optimizer=torch.optim.NAdam(model.parameters(), lr=0.01),
        lr_scheduler=lambda of: torch.optim.lr_scheduler.LambdaLR(of, lambda n: 1 / (1 + n)),
    )  # fmt: skip
    alone = losses_of(job, make_plan(job), run_dir=tmp_path / "alone", last_step=STEPS)
    count = len(describe(job).layers)
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", pipeline_size=4,
        boundaries=tuple(count * rank // 4 for rank in range(4)),
    )  # fmt: skip
    overlapped = job.model_copy(
        update={"pipeline": job.pipeline.model_copy(update={"overlap_steps": True})}
    )
    assert losses_of(overlapped, plan, run_dir=tmp_path / "cut", last_step=STEPS) == alone
    assert len(set(alone)) == STEPS
