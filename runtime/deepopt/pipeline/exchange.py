"""The exchange at the end of a step: the row that a worker gives, and what the rows of all say.

From the same rows every worker computes the same norm, the same coefficient and the same verdict on
the numbers. It moves no row and updates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.optimizer import clip_coefficient
from deepopt.pipeline.reporters import RoutersByReporter, TrainableParameters
from deepopt.pipeline.spans import Span, Totals
from deepopt.pipeline.stage import Stage
from deepopt.pipeline.stage_experts import count_bad_scores, summarise
from deepopt.pipeline.step_result import BadNumbers, RankTimes, StepResult, Wish
from deepopt.planner.plan import Plan


class Exchange:
    """What one worker gives and reads.

    Args:
        job: the resolved job.
        plan: who holds what.
        rank: this worker's rank in the world.
        stages: the stages it holds, by index.
        trainable: which parameters there are.
        routers: which routers there are.
        rate: the learning rate of a step.
    """

    def __init__(
        self,
        *,
        job: JobConfig,
        plan: Plan,
        rank: int,
        stages: Mapping[int, Stage],
        trainable: TrainableParameters,
        routers: RoutersByReporter,
        rate: Callable[[int], float],
    ) -> None:
        self._grad_clip = job.training.grad_clip
        self._norm_limit = job.faults.norm_limit
        self._plan = plan
        self._rank = rank
        self._stages = stages
        self._trainable = trainable
        self._routers = routers
        self._rate = rate

    def row(
        self, wishes: Wish, totals: Totals, *, step_s: float, update_s: float
    ) -> list[float]:
        """This worker's row; the same length on all of them.

        Args:
            wishes: what it was asked for.
            totals: seconds of its actions.
            step_s: seconds since the step began.
            update_s: seconds of the update of the step before.
        """
        losses = [0.0] * self._plan.num_microbatches
        last = self._stages.get(self._plan.num_stages - 1)
        if last is not None:
            values = torch.stack([loss.float() for loss in last.losses.values()]).tolist()
            for microbatch, value in zip(last.losses, values, strict=True):
                losses[microbatch] = value
        norms = self._own_norms()
        norms += [0.0] * (self._trainable.most_norms - len(norms))
        times = [step_s, totals.compute_s, totals.wait_s, totals.send_s, totals.reduce_s]
        figures = self._own_figures()
        figures += [0.0] * (self._routers.most_figures - len(figures))
        bad = min((s.bad_layer for s in self._stages.values() if s.bad_layer >= 0), default=-1)
        return [
            float(wishes),
            *times,
            update_s,
            *losses,
            *norms,
            *figures,
            float(bad),
        ]

    def _own_figures(self) -> list[float]:
        return [
            number
            for index in self._routers.by_reporter.get(self._rank, ())
            for figures in self._stages[index].experts.figures()
            for number in figures.row()
        ]

    def _own_norms(self) -> list[float]:
        names = self._trainable.by_reporter.get(self._rank, ())
        if not names:
            return []
        totals: dict[str, torch.Tensor] = {}
        for stage in self._stages.values():
            totals |= stage.gradients.totals()
        norms = torch.stack([torch.linalg.vector_norm(totals[name]) for name in names])
        values: list[float] = norms.tolist()
        return values

    def read(
        self, step: int, rows: Sequence[Sequence[float]], spans: list[Span]
    ) -> tuple[StepResult, float]:
        """What the rows of all ranks say.

        Args:
            step: the step that they are of.
            rows: as from `row`, by rank.
            spans: of this worker's actions, for the result.

        Returns:
            (result, what to scale the gradients by).
        """
        plan = self._plan
        wishes = Wish.NONE
        for row in rows:
            wishes |= Wish(int(row[0]))
        num_losses = plan.num_microbatches
        owners = plan.group_owners(plan.num_stages - 1)
        losses: list[float] = []
        for data_index in range(plan.data_size):
            offset = data_index * len(plan.replica_groups(0))
            for local, (start, end) in enumerate(plan.replica_groups(data_index)):
                losses += rows[owners[offset + local]][7 + start : 7 + end]
        norms = {
            name: norm
            for rank, names in self._trainable.by_reporter.items()
            for name, norm in zip(names, rows[rank][7 + num_losses :], strict=False)
        }
        ordered = [norms[name] for name in self._trainable.names]
        grad_norm, coefficient = clip_coefficient(ordered, max_norm=self._grad_clip)
        loss = math.fsum(losses) / num_losses
        limit = self._norm_limit
        bad = None
        figures = self._routers.read(rows, first=7 + num_losses + self._trainable.most_norms)
        num_bad_scores = count_bad_scores(figures)
        if not math.isfinite(loss + grad_norm) or (limit is not None and grad_norm > limit):
            places = {int(row[-1]): rank for rank, row in enumerate(rows) if row[-1] >= 0}
            first = min(places, default=None)
            bad = BadNumbers(
                step=step,
                what=_what_is_bad(
                    losses, norms, self._trainable.names, grad_norm=grad_norm, limit=limit
                ),
                layer=None if first is None else plan.layer_names[first],
                rank=None if first is None else places[first],
            )
        elif num_bad_scores:
            bad = BadNumbers(
                step=step,
                what=f"the scores of routers are not finite for {num_bad_scores} tokens",
                layer=None,
                rank=None,
            )
        result = StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._rate(step),
            wishes=wishes,
            times=tuple(
                RankTimes(
                    step_s=row[1],
                    compute_s=row[2],
                    wait_s=row[3],
                    send_s=row[4],
                    reduce_s=row[5],
                    update_s=row[6],
                )
                for row in rows
            ),
            spans=spans,
            clipped=coefficient < 1.0,
            bad=bad,
            experts=summarise(figures),
            expert_loads=tuple(
                load
                for index in self._routers.by_reporter.get(self._rank, ())
                for load in self._stages[index].experts.loads()
            ),
        )
        return result, coefficient


def _what_is_bad(
    losses: Sequence[float],
    norms: Mapping[str, float],
    names: Sequence[str],
    *,
    grad_norm: float,
    limit: float | None,
) -> str:
    bad_losses = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    bad_norms = [name for name in names if not math.isfinite(norms[name])]
    parts = []
    if bad_losses:
        parts.append(f"the loss of micro-batch {bad_losses[0]} is {losses[bad_losses[0]]}")
    if bad_norms:
        parts.append(f"the gradient of {bad_norms[0]} has norm {norms[bad_norms[0]]}")
        if len(bad_norms) > 1:
            parts[-1] += f" ({len(bad_norms)} of {len(names)} parameters are affected)"
    if not parts:
        largest = max(names, key=lambda name: norms[name])
        above = "" if limit is None else f", above faults.norm_limit ({limit:g})"
        parts.append(
            f"the gradient norm is {grad_norm:g}{above}; that of {largest} alone is "
            f"{norms[largest]:g}"
        )
    return " and ".join(parts)
