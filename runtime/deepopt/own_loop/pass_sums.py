"""What the ranks of somebody's own loop add up after a pass: gradients, and what routers counted."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deepopt.moe.step_totals import bad_scores
from deepopt.pipeline.reduction import Reducer, channels
from deepopt.pipeline.reporters import TrainableParameters
from deepopt.pipeline.stage import Stage
from deepopt.pipeline.stage_build import count_buckets, stage_bucket, tied_buckets
from deepopt.pipeline.transport import Channel, Transport
from deepopt.planner.plan import Plan


class PassSums:
    """The buckets of a rank, and what its routers have counted since their last update.

    Args:
        stages: that it holds, by index.
        plan: who holds what.
        rank: this one.
        trainable: tells which weights are tied.
        transport: to the others.

    Attributes:
        reducer: sums what an executor gives it.
        buckets: by stage, of what the executor starts.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        *,
        plan: Plan,
        rank: int,
        trainable: TrainableParameters,
        transport: Transport,
    ) -> None:
        self._stages = stages
        self._rank = rank
        self._transport = transport
        self.reducer = Reducer(transport)
        self.buckets = {i: stage_bucket(stage, plan=plan) for i, stage in stages.items()}
        self._late_buckets = (
            *tied_buckets(stages, plan=plan, trainable=trainable),
            *count_buckets(stages, plan=plan, rank=rank, trainable=trainable),
        )
        self._has_counts = False  # since the last update of the routers

    def channels(self) -> list[Channel]:
        """What the sums travel on."""
        buckets = (*self.buckets.values(), *self._late_buckets)
        return [channel for b in buckets for channel in channels(b.holders, self._rank)]

    def finish(self) -> dict[str, torch.Tensor]:
        """Complete the sums of a pass; on all ranks together.

        Returns:
            The summed gradients, by the name of each use; the memory is used again.
        """
        for bucket in self._late_buckets:
            self.reducer.start(bucket)
        self.reducer.finish()
        found: dict[str, torch.Tensor] = {}
        for stage in self._stages.values():
            if stage.experts:
                stage.experts.latch(more=self._has_counts)
            found |= stage.gradients.totals()
        self._has_counts = True
        return found

    def update_routers(self, grads: Mapping[str, torch.Tensor]) -> None:
        """Move the routers' biases by all that was counted since the last time; on all ranks together.

        Args:
            grads: of the experts, by the name of each use; those of overloaded ones may shrink.

        Raises:
            TrainingError: scores were not finite; nothing was moved. On all ranks.
        """
        if not self._has_counts:
            return
        self._has_counts = False
        experts = [stage.experts for stage in self._stages.values()]
        num_bad = float(sum(e.num_bad_tokens() for e in experts))
        rows = self._transport.start_all_gather([num_bad]).wait()
        if most := max(row[0] for row in rows):
            raise bad_scores(int(most), where="routers")
        for stage_experts in experts:
            stage_experts.compensate(grads)
            stage_experts.update()

    def forget(self) -> None:
        """Drop the sums of a pass that failed."""
        self.reducer.forget()
