"""The peer of `overhead.py`: a training loop as a PyTorch user writes it, one process, no pipeline.

Same model, initial values, batches, optimizer, clipping and learning rates as a deepopt run of the same
job; nothing of `deepopt.pipeline` runs here, except the two pure functions of the learning rate and the
job's own description of the model. As a script it writes one JSON line a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepopt.config import JobConfig, OptimizerConfig
from deepopt.convert import build_chain, build_layers, find_loss
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.job_file import load_job
from deepopt.pipeline.learning_rate import learning_rate
from deepopt.pipeline.stage import Loss


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW:
    """AdamW as a job asks for it: decay on matrices alone.

    Args:
        parameters: each once.
        config: the job's optimizer section.
    """
    parameters = list(parameters)
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )


def set_auxiliary_scale(module: torch.nn.Module, scale: float) -> None:
    """Set the factor of the losses that routers add on their own.

    Args:
        module: the model or a part of it.
        scale: what the loop multiplies the loss of a micro-batch with before `backward`.
    """
    for part in module.modules():
        if hasattr(part, "loss_scale"):
            part.loss_scale = scale  # type: ignore[assignment]


def data_parallel_step(
    model: torch.nn.Module,
    *,
    step: int,
    job: JobConfig,
    batches: BatchSource,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    own: Sequence[int],
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Train one step on this rank's share of the micro-batches.

    Args:
        model: wrapped so that its gradients are means over the ranks.
        step: 1-based.
        job: training and optimizer sections count.
        batches: of the job.
        loss: of the model.
        optimizer: of its parameters.
        own: this rank's micro-batches.
        apart: what all of them but the last run in.

    Returns:
        Mean loss over all ranks.
    """
    optimizer.zero_grad()
    total = torch.zeros(())
    for microbatch in own:
        inputs, targets = batches.batch(step, microbatch)
        with nullcontext() if microbatch == own[-1] else apart():
            value = loss(model(inputs), targets)
            (value / len(own)).backward()
        total += value.detach() / len(own)
    if job.training.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.training.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, job.optimizer)
    optimizer.step()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


class PlainLoop:
    """A model in one process with gradient accumulation over the micro-batches.

    Args:
        job: model, data, training and optimizer sections count; the rest is not looked at.
        batches: of the same job.
    """

    def __init__(self, job: JobConfig, batches: BatchSource) -> None:
        self._job = job
        self._batches = batches
        self.model = build_model(job)
        self._loss = find_loss(job, self.model)
        self._optimizer = make_optimizer(self.model.parameters(), job.optimizer)
        set_auxiliary_scale(self.model, 1.0 / job.training.microbatches)

    def step(self, step: int) -> tuple[float, float]:
        """Train one step.

        Args:
            step: 1-based.

        Returns:
            (mean loss, global gradient norm before clipping).
        """
        training = self._job.training
        self._optimizer.zero_grad()
        losses = []
        for microbatch in range(training.microbatches):
            inputs, targets = self._batches.batch(step, microbatch)
            loss = self._loss(self.model(inputs), targets)
            (loss / training.microbatches).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(),
            float("inf") if training.grad_clip is None else training.grad_clip,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._job.optimizer)
        self._optimizer.step()
        return torch.stack(losses).mean().item(), norm.item()


def build_model(job: JobConfig) -> torch.nn.Module:
    """The job's model with the initial values that a deepopt run gives it.

    Args:
        job: names the model.
    """
    chain = build_chain(job, device="cpu")
    layers, _ = build_layers(job, range(len(chain.layers)), device=torch.device("cpu"))
    values = {name: p.detach() for layer in layers for name, p in layer.parameters.items()}
    # A tied parameter appears under each of its names, always with the same values.
    chain.model.load_state_dict(values, strict=False)
    return chain.model.train()


def main() -> None:
    """Train a job and write a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=Path, required=True, help="job file")
    parser.add_argument("--steps", type=int, required=True, help="steps to train")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a step")
    arguments = parser.parse_args()
    job = load_job(arguments.job, [])
    torch.set_num_threads(job.worker.threads)
    loop = PlainLoop(job, build_batch_source(job, run_dir=None))
    with arguments.out.open("w", buffering=1) as out:
        ended = time.perf_counter()
        for step in range(1, arguments.steps + 1):
            loss, norm = loop.step(step)
            began, ended = ended, time.perf_counter()
            record = {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "step_time_s": ended - began,
            }
            out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
