"""A converted model in stages, next to the original: losses and gradients of both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_chain, build_layers, describe, find_loss
from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.samples import model_inputs
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.stage import Stage

CPU = torch.device("cpu")


def make_job(factory: str, dataset: str, *, loss: str | None = None, **data: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "model": {"factory": factory, "loss": loss},
            "data": {"dataset": dataset, "kwargs": data},
            "training": {"microbatches": 1, "microbatch_size": 2},
        }
    )


def of_original(job: JobConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the model as its factory gives it, in train mode; a gradient has each
    name of its parameter."""
    torch.manual_seed(job.training.seed)
    model = build_chain(job, device="cpu").model.train()
    inputs, targets = build_batch_source(job, run_dir=None).batch(1, 0)
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    loss = find_loss(job, model)(output, targets)
    loss.backward()
    named = model.named_parameters(remove_duplicate=False)
    return loss.detach(), {n: p.grad for n, p in named if p.grad is not None}


def in_stages(
    job: JobConfig, boundaries: Sequence[int], *, recompute: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[tuple[torch.Tensor, ...]]]:
    """Loss, gradients by the names of the `state_dict`, and what each cut carried."""
    skeleton = describe(job)
    layers, loss = build_layers(job, range(len(skeleton.layers)), device=CPU)
    edges = [*boundaries, len(layers)]
    stages = []
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        held = layers[start:end]
        trainable = {n: p for layer in held for n, p in layer.trainable.items()}
        gradients = StageGradients(trainable, apart=[], groups=[0], device=CPU)
        stages.append(
            Stage(
                index,
                held,
                gradients=gradients,
                group_of={0: 0},
                seed=job.training.seed,
                device=CPU,
                num_microbatches=1,
                loss=loss if end == len(layers) else None,
                recompute=[layer.index for layer in held] if recompute else (),
            )
        )
    batch, targets = build_batch_source(job, run_dir=None).batch(1, 0)
    values = model_inputs(batch)
    carried = []
    for stage in stages:
        stage.begin_step(1)
        values = stage.forward(0, values, targets)
        values = tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in values)
        carried.append(values)
    grads: tuple[torch.Tensor, ...] = ()
    for stage in reversed(stages):
        grads = stage.backward(0, tuple(g.clone() for g in grads))
    found: dict[str, torch.Tensor] = {}
    totals = {n: g for stage in stages for n, g in stage.gradients.totals().items()}
    owners = {p.name: p.tied_to for layer in skeleton.layers for p in layer.parameters}
    for name in reversed(totals):  # as backward meets them: the last use first
        owner = owners[name] or name
        found[owner] = found[owner] + totals[name] if owner in found else totals[name]
    return stages[-1].losses[0], found, carried[:-1]
