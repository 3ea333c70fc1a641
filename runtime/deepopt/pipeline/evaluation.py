"""A validation set through the pipeline: forwards alone, by the same executor and the same stages.

The loss is the mean over the micro-batches, each computed as it would be in one process and weighted
by its samples, and added exactly: so it has the same bits wherever the layers are.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from deepopt.pipeline.executor import Batches, Executor
from deepopt.pipeline.reduction import Reducer
from deepopt.pipeline.spans import SpanRecorder
from deepopt.pipeline.stage import Cut, Stage
from deepopt.pipeline.transport import (
    Transport,
)
from deepopt.planner.plan import Plan
from deepopt.schedule.forward_only import forward_only
from deepopt.schedule.ir import Action, Op
from deepopt.schedule.lowering import lower
from deepopt.schedule.run_ahead import RunAhead


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What every worker knows after an evaluation.

    Args:
        loss: mean over the samples; None where their outputs were taken instead.
        time_s: it took, on this worker.
    """

    loss: float | None
    time_s: float


class Evaluator:
    """This worker's part in evaluations.

    Args:
        plan: who holds what.
        rank: of this worker.
        stages: that it holds, by index.
        transport: to the other workers, its channels open.
        batches: of the validation set, as micro-batches 0, 1, ... of step 1; None where neither the
            first nor the last stage is held.
        num_microbatches: of the validation set; the same on all workers.
        device: where the layers are.
        lookahead: receives posted ahead.

    Attributes:
        executor: of the forwards; for who asks how far it is.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        batches: Batches | None,
        num_microbatches: int,
        device: torch.device,
        lookahead: int,
    ) -> None:
        self._stages = stages
        self._transport = transport
        self._spans = SpanRecorder(device)
        self._last_stage = plan.num_stages - 1
        self._begun: int | None = None  # last forwards here; read by the heartbeat thread
        placement = plan.make_placement()
        data_index, pipeline_rank = divmod(rank, plan.pipeline_size)
        # Each replica has a contiguous share.
        edges = [num_microbatches * d // plan.data_size for d in range(plan.data_size + 1)]
        schedules = [
            forward_only(placement, num_microbatches=end - start)
            for start, end in itertools.pairwise(edges)
        ]
        self._owners = [  # of each micro-batch: the rank that has its output
            replica * plan.pipeline_size + placement.rank_of(self._last_stage, direction)
            for replica, schedule in enumerate(schedules)
            for direction in schedule.directions
        ]
        own = schedules[data_index]
        rows = lower(own, reduce=False)
        self.executor = Executor(
            rows[pipeline_rank],
            ahead=RunAhead(num_actions=0, arriving=()),
            placement=placement,
            directions=own.directions,
            stages=stages,
            buckets={},
            transport=transport,
            reducer=Reducer(transport),
            batches=batches,
            first_rank=data_index * plan.pipeline_size,
            first_microbatch=edges[data_index],
            lookahead=lookahead,
            spans=self._spans,
            on_whole=lambda stage: None,
            shapes="evaluation",  # eval mode may carry other tensors over the cuts
            before_action=self._count,
        )

    def progress(self) -> tuple[int, int] | None:
        """(Micro-batches whose last forward has begun on this worker, micro-batches on all workers) of the
        evaluation in work; None where there is none. From any thread."""
        begun = self._begun
        return None if begun is None else (begun, len(self._owners))

    def run(
        self,
        *,
        take_output: Callable[[int, Any], None] | None = None,
        cut: Cut | None = None,
        samples: Sequence[int] | None = None,
    ) -> Evaluation:
        """Evaluate the layers as they are. Nothing may be in flight.

        Args:
            take_output: takes (micro-batch, the model's output), on the workers that hold the last
                stage, instead of a loss being computed.
            cut: leaves the output and targets that a loss is computed of.
            samples: that count, of each micro-batch; None: equally many.

        Raises:
            TransportError: a peer is gone.
        """
        began = time.perf_counter()
        with ExitStack() as stack:
            stack.callback(self._end)
            self._begun = 0
            for stage in self._stages.values():
                stack.enter_context(stage.evaluating(take_output=take_output, cut=cut))
            self.executor.run_step(1)
        self._transport.finish_sends()
        self._spans.take()
        losses = [0.0] * len(self._owners)
        last = self._stages.get(self._last_stage)
        if last is not None:
            for microbatch, value in last.losses.items():
                losses[microbatch] = float(value)
            last.losses.clear()
        rows = self._transport.start_all_gather(losses).wait()
        loss = None
        if take_output is None:
            own = [rows[owner][index] for index, owner in enumerate(self._owners)]
            loss = weighted_mean(own, samples or [1] * len(own))
        return Evaluation(loss=loss, time_s=time.perf_counter() - began)

    def _count(self, step: int, action: Action) -> None:
        if action.op is Op.F and action.stage == self._last_stage:
            self._begun = (self._begun or 0) + 1

    def _end(self) -> None:
        self._begun = None


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """The mean, added exactly; equal weights of any size give the same bits.

    Args:
        values: of float32, or narrower.
        weights: at least 1 each, below 2**29: their products with the values are exact.
    """
    unit = math.gcd(*weights)
    parts = [weight // unit for weight in weights]
    return math.fsum(v * w for v, w in zip(values, parts, strict=True)) / sum(parts)
