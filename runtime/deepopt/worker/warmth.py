"""What a process has ready before it knows its rank: a spare makes it while it waits."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker.ready_layers import ReadyLayers, build_ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """What does not depend on the rank.

    Args:
        skeleton: the model.
        batches: the data.
        layers: that it has built; None where it has built none.
    """

    skeleton: ModelSkeleton
    batches: BatchSource
    layers: ReadyLayers | None = None


def warm_up(job: JobConfig, run_dir: Path, *, builds: bool = False) -> Warmth:
    """Do in this process what does not depend on the rank.

    Args:
        job: the resolved job.
        run_dir: the run directory.
        builds: whether to build layers, too, in host memory.

    Raises:
        InputError: model or data cannot be built here.
    """
    torch.set_num_threads(job.worker.threads)
    out = torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)
    # With gradients given, as in a step: the first such call imports sympy, for 0.4 s and more.
    torch.autograd.backward([out], [torch.ones(8, 8)])
    skeleton = describe(job)
    warmth = Warmth(
        skeleton=skeleton,
        batches=build_batch_source(job, run_dir=run_dir),
        layers=build_ahead(job, skeleton, run_dir=run_dir) if builds else None,
    )
    # What is imported stays. A collection that looks at all of it, a few hundred thousand objects,
    # takes 0.1 s and more, and would come while a replacement builds its layers.
    gc.collect()
    gc.freeze()
    return warmth
