"""What of a worker is emulated with `worker.device: emulated`: its device and its links.

Stages, executor, schedule and sums of gradients do not know of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.pipeline.emulated_device import EmulatedDevice, EmulatedOptimizer, action_times_s
from deepopt.pipeline.emulated_transport import EmulatedTransport
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.reduction import Bucket
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.transport import Channel, Kind, Transport
from deepopt.pipeline.update_rule import UpdateRule
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import Action


class Emulation:
    """The emulated device of one worker and its links, by the job's `emulation` section.

    Args:
        job: the resolved job.
        plan: who holds what.
        rank: this worker's rank in the world.
        program: what it does in a step.

    Raises:
        PlanError: figures that do not fit the layers or the ranks.
    """

    def __init__(
        self, job: JobConfig, *, plan: Plan, rank: int, program: Sequence[Action]
    ) -> None:
        self._costs = plan.costs_of(emulated_costs(job, num_layers=len(plan.layer_names)))
        self._pipeline_rank = rank % plan.pipeline_size
        self._plan = plan
        self._config = job.optimizer
        self._table = plan.stage_costs(self._costs)
        self.device = EmulatedDevice(
            action_times_s(program, costs=self._table, rank=self._pipeline_rank)
        )

    def optimizer(self, layer: Layer, *, rule: UpdateRule) -> LayerOptimizer:
        """The optimizer of a layer, on the emulated device where its update takes a stated time.

        Args:
            layer: of this worker.
            rule: of the job.
        """
        factors = self._costs.rank_factor
        factor = factors[self._pipeline_rank] if factors else 1.0
        update_s = self._costs.update_s[layer.index] * factor
        if update_s == 0:
            return rule.optimizer(layer)
        if self._config.factory is not None:
            raise PlanError(
                f"emulation.update_ms is set for layer {layer.name}, and the optimizer is "
                f"{self._config.factory}",
                remedy="only the built-in adamw is emulated: leave one of them out",
            )
        return EmulatedOptimizer(layer, self._config, device=self.device, update_s=update_s)

    def transport(self, inner: Transport, *, buckets: Mapping[int, Bucket]) -> Transport:
        """The transport over emulated links; the real one where links take no time.

        Args:
            inner: the real one.
            buckets: of this worker's stages: their gradients take the time that the job states,
                whatever the real size.

        Raises:
            ClusterError: links are emulated, and workers run on several hosts.
        """
        costs = self._costs
        if inner.world_size == 1 or (costs.latency_s == 0 and costs.bytes_per_s is None):
            return inner
        stage_bytes = costs.per_stage(costs.gradient_bytes, self._plan.boundaries)
        rate = costs.bytes_per_s
        element_s = {
            index: 0.0 if rate is None else stage_bytes[index] / rate / max(1, bucket.numel)
            for index, bucket in buckets.items()
        }

        def transfer_s(
            channel: Channel, message: int, tensors: Sequence[torch.Tensor]
        ) -> float:
            if channel.kind is not Kind.REDUCTION:
                return self._table.transfer_s
            # Reductions number their messages by bucket, two rounds each; weights that are tied
            # between stages have buckets of their own, which the job states no size for.
            elements = sum(tensor.numel() for tensor in tensors)
            return elements * element_s.get(message // 2, 0.0)

        timed = frozenset(
            kind
            for kind in Kind
            if self._table.latency_s
            or (any(stage_bytes) if kind is Kind.REDUCTION else self._table.transfer_s)
        )
        return EmulatedTransport(
            inner, latency_s=self._table.latency_s, transfer_s=transfer_s, timed=timed
        )
