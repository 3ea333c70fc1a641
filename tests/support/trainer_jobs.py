"""Jobs as `DeepTrainer` makes them, without its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.trainer.data import Reading, read_data
from deepopt.trainer.job import Settings, job_of

_DEFAULTS: dict[str, Any] = {
    "device_map": None, "workers": None, "placement": "auto", "elb": {}, "loss_fn": None,
    "optimizer": None, "optimizer_kwargs": None, "lr_scheduler": None,
    "lr_scheduler_kwargs": None, "grad_clip": None, "groups": None, "name": "test",
    "hostfile": None, "address": None, "overrides": {"logging": {"peak_flops": 1e9}},
}  # fmt: skip


def make_trainer_job(
    model: torch.nn.Module,
    dataset: Any,
    folder: Path,
    *,
    steps: int,
    microbatches: int,
    **settings: Any,
) -> JobConfig:
    """The job of a fit over batches of eight samples.

    Args:
        model: as the script has it.
        dataset: of any kind.
        folder: for what the script brings along.
        steps: to train.
        microbatches: of a step.
        settings: other arguments of `Settings`.
    """
    reading = Reading(batch_size=8, microbatches=microbatches)
    data = read_data(dataset, model=model, reading=reading)
    return job_of(
        model, data, Settings(**{**_DEFAULTS, **settings}), steps=steps, folder=folder
    )
