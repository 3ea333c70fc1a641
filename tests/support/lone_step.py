"""A whole model as one pipeline step in this process, with peers that a transport makes up."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.errors import TransportError
from deepopt.pipeline.executor import Batches
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import PendingGather
from support.worker_processes import make_plan, tiny_job

# With so high a learning rate the norm is below 3, jumps above it in step 4, and falls again.
CLIP_STEP_4 = 3.0


class Cut(LoneTransport):
    """Its peers die while one exchange is under way."""

    world_size = 2  # nobody runs ahead alone

    def __init__(self) -> None:
        self.fails = False
        self.rows: list[list[float]] = []

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        self.rows = [list(values)]
        return self

    def wait(self) -> list[list[float]]:
        if self.fails:
            self.fails = False
            raise TransportError("a peer is gone")
        return self.rows


def job_of(*, overlap: bool, **sections: object) -> JobConfig:
    return tiny_job(
        training={"grad_clip": CLIP_STEP_4, "microbatches": 2, "microbatch_size": 1},
        optimizer={"learning_rate": 0.1},
        pipeline={"overlap_steps": overlap},
        **sections,  # type: ignore[arg-type]
    )


def make_step(
    job: JobConfig, transport: LoneTransport, *, batches: Batches | None = None
) -> PipelineStep:
    plan = make_plan(job)
    indices = range(len(plan.layer_names))
    layers, loss = build_layers(job, indices, device=torch.device("cpu"))
    return PipelineStep(
        job=job,
        plan=plan,
        skeleton=describe(job),
        rank=0,
        layers=dict(zip(indices, layers, strict=True)),
        loss=loss,
        transport=transport,
        batches=batches or build_batch_source(job, run_dir=None),
        device=torch.device("cpu"),
    )


def state_of(step: PipelineStep) -> dict[str, torch.Tensor]:
    return {
        key: tensor.clone()
        for optimizer in step.optimizers.values()
        for key, tensor in optimizer.export_state().items()
    }
