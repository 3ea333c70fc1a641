"""Activations that are predicted from layers tried one by one are those that a step holds at its peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.planner.orders import built_order
from deepopt.planner.rank_memory import rank_bytes
from deepopt.worker.calibrate import calibrate
from support.worker_processes import make_plan, tiny_job

CPU = torch.device("cpu")


class LiveBytes:
    """Counts the storages that autograd holds for backwards, weights left out."""

    def __init__(self, weights: set[int]) -> None:
        self.peak = 0
        self._weights = weights
        self._uses: dict[int, int] = {}
        self._now = 0

    def pack(self, tensor: torch.Tensor) -> Saved:
        return Saved(tensor, self)

    def hold(self, storage: torch.UntypedStorage, by: int) -> None:
        key = storage.data_ptr()
        if key in self._weights:
            return
        before = self._uses.get(key, 0)
        self._uses[key] = before + by
        if before == 0 or before + by == 0:
            self._now += by * storage.nbytes()
            self.peak = max(self.peak, self._now)


class Saved:
    """A tensor that autograd keeps until it needs it no more."""

    def __init__(self, tensor: torch.Tensor, live: LiveBytes) -> None:
        self.tensor, self._live = tensor, live
        live.hold(tensor.untyped_storage(), by=1)

    def __del__(self) -> None:
        self._live.hold(self.tensor.untyped_storage(), by=-1)


@pytest.mark.parametrize(("schedule", "in_flight"), [("gpipe", 4), ("1f1b", 1)])
def test_a_step_holds_the_activations_that_were_predicted(
    schedule: str, in_flight: int
) -> None:
    job = tiny_job(training={"microbatches": 4}, pipeline={"schedule": schedule})
    skeleton, plan = describe(job), make_plan(job, schedule=schedule)
    batches = build_batch_source(job, run_dir=None)
    costs = calibrate(job, skeleton, batches=batches, device=CPU)
    assert costs is not None
    costs = replace(costs, state_bytes=(0.0,) * costs.num_layers)
    (predicted,) = rank_bytes(costs, plan, built_order(plan, data_index=0))
    assert predicted == pytest.approx(in_flight * sum(costs.activation_bytes))

    indices = range(len(plan.layer_names))
    layers, loss = build_layers(job, indices, device=CPU)
    step = PipelineStep(
        job=job,
        plan=plan,
        skeleton=skeleton,
        rank=0,
        layers=dict(zip(indices, layers, strict=True)),
        loss=loss,
        transport=LoneTransport(),
        batches=batches,
        device=CPU,
    )
    step.run(1)
    live = LiveBytes(
        {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters.values()}
    )
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda saved: saved.tensor):
        step.run(2)
    assert live.peak == pytest.approx(predicted, rel=0.05)
