"""Layers that a waiting process has built before it knows its rank: which, and what they are.

They are what `build_layers` gives, initial values included, so whoever takes them is where it would be
without them. Only in host memory: a process that waits has no device of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.errors import RunDirectoryError
from deepopt.pipeline.stage import Layer, Loss
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json

# What a worker holds for each weight in training: the weight, its gradient and AdamW's two moments.
HELD_PER_WEIGHT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyLayers:
    """Layers with their initial values.

    Args:
        layers: by index in the chain.
        loss: of the model.
    """

    layers: dict[int, Layer]
    loss: Loss

    def take(self, indices: Sequence[int]) -> tuple[list[Layer], Loss] | None:
        """Layers for good: what is not asked for is forgotten.

        Args:
            indices: which.

        Returns:
            As from `build_layers`; None where one of them is not there.
        """
        if not self.layers.keys() >= set(indices):
            return None
        taken = [self.layers[i] for i in indices]
        self.layers.clear()
        return taken, self.loss


def choose_layers(plan: Plan, skeleton: ModelSkeleton) -> tuple[int, ...]:
    """The layers to build ahead: all that any worker holds, if they take no more memory than the largest
    worker has in training; else none.

    Args:
        plan: of the running group.
        skeleton: the model.
    """

    def size(indices: Sequence[int]) -> int:
        return sum(p.numel for i in indices for p in skeleton.layers[i].parameters)

    held = [
        [i for stage in plan.held_stages(rank) for i in plan.stage_layers(stage)]
        for rank in range(plan.pipeline_size)
    ]
    everything = tuple(range(len(skeleton.layers)))
    room = HELD_PER_WEIGHT * max(size(indices) for indices in held)
    return everything if size(everything) <= room else ()


def build_ahead(
    job: JobConfig, skeleton: ModelSkeleton, *, run_dir: Path
) -> ReadyLayers | None:
    """Build the layers that `choose_layers` names.

    Args:
        job: the resolved job.
        skeleton: the model.
        run_dir: the run directory; its plan says what workers hold.

    Returns:
        None where there is no plan, or it names none.

    Raises:
        InputError: the model cannot be built here.
    """
    try:
        plan = Plan.from_json(read_json(RunDirectory(run_dir).plan))
    except RunDirectoryError:  # not written yet, or not on this host
        return None
    indices = choose_layers(plan, skeleton)
    if not indices:
        return None
    layers, loss = build_layers(job, indices, device=torch.device("cpu"))
    return ReadyLayers(layers=dict(zip(indices, layers, strict=True)), loss=loss)
