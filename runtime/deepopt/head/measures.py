"""Figures of a step from its report: rates, MFU, bubble, time left. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deepopt.worker.messages import StepReport

T = TypeVar("T")

FLOPS_PER_FORWARD_FLOP = 3.0  # a step costs one forward, and a backward of twice a forward
PACE_STEPS = 20  # steps whose mean time predicts the time left
RECENT_STEPS = (
    1_000  # whose median is told while the job runs: it is found anew after each step
)
STEPS_KEPT = 10_000  # of a long launch, for its closing report
COUNTS_KEPT = 100_000  # steps whose tokens are known: a checkpoint that is being written is of one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """What is worth showing of one step.

    Args:
        tokens_per_s: over all workers.
        tokens_per_s_per_worker: the same, a worker.
        mfu: share of the workers' peak that the model's own operations used; None when a peak
            or the model's operations are unknown.
        bubble: share of the workers' time in the step that was not compute.
        stage_busy: share of the step that each rank computed.
    """

    tokens_per_s: float
    tokens_per_s_per_worker: float
    mfu: float | None
    bubble: float
    stage_busy: tuple[float, ...]


def figures_of(
    report: StepReport, *, forward_flops_per_token: float, peak_flops: Mapping[int, float]
) -> StepFigures:
    """Figures of one step.

    Args:
        report: the step.
        forward_flops_per_token: of the whole model; 0 when unknown.
        peak_flops: FLOP/s of each rank's device; 0 when unknown.
    """
    tokens_per_s = report.tokens / report.step_time_s if report.step_time_s > 0 else 0.0
    num_workers = max(1, len(report.workers))
    peaks = [peak_flops.get(times.rank, 0.0) for times in report.workers]
    mfu = None
    if peaks and all(peak > 0 for peak in peaks) and forward_flops_per_token > 0:
        done = FLOPS_PER_FORWARD_FLOP * forward_flops_per_token * tokens_per_s
        mfu = done / sum(peaks)
    busy = tuple(
        min(1.0, times.compute_s / report.step_time_s) if report.step_time_s > 0 else 0.0
        for times in report.workers
    )
    return StepFigures(
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_worker=tokens_per_s / num_workers,
        mfu=mfu,
        bubble=1.0 - sum(busy) / num_workers if busy else 0.0,
        stage_busy=busy,
    )


def metrics_line(report: StepReport, figures: StepFigures, *, time: str) -> dict[str, Any]:
    """A step as a line of `metrics.jsonl`, without the step itself.

    Args:
        report: the step.
        figures: its figures.
        time: date and time for people.
    """
    line: dict[str, Any] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "tokens": report.tokens,
        "step_time_s": report.step_time_s,
        "tokens_per_s": figures.tokens_per_s,
        "tokens_per_s_per_worker": figures.tokens_per_s_per_worker,
        "mfu": figures.mfu,
        "generation": report.sender.generation,
        "bubble": figures.bubble,
        "compute_s": [times.compute_s for times in report.workers],
        "wait_s": [times.wait_s for times in report.workers],
        "time": time,
    }
    return {**report.scalars, **line}


@dataclass(slots=True)
class Pace:
    """Step times of one launch, for the time left and for the closing report: of its last `STEPS_KEPT`
    steps, so that neither a head's memory nor what it does after a step grows with the training.

    Args:
        step_s: of each step.
        update_s: the shortest update of any worker in each step; the others' include waiting.
        reduce_s: the same of gradient sums.
        figures: of each step.
        warm_up: of each step, the share of routers that warmed up in it; 0 for a model without any.
        num_steps: of the whole launch.
        num_warm_up_steps: of these, those in which any router warmed up.
    """

    step_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    reduce_s: list[float] = field(default_factory=list)
    figures: list[StepFigures] = field(default_factory=list)
    warm_up: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_warm_up_steps: int = 0

    def add(self, report: StepReport, figures: StepFigures) -> None:
        """Take one step."""
        share = float(report.scalars.get("warm_up_share", 0.0))
        self.num_steps += 1
        self.num_warm_up_steps += share > 0
        _append(self.figures, figures)
        _append(self.step_s, report.step_time_s)
        _append(self.warm_up, share)
        if report.workers:
            _append(self.update_s, min(times.update_s for times in report.workers))
            _append(self.reduce_s, min(times.reduce_s for times in report.workers))

    def time_left_s(self, num_steps: int) -> float | None:
        """Seconds for so many steps more; None before the first step."""
        recent_s = self.step_s[-PACE_STEPS:]
        return max(0, num_steps) * sum(recent_s) / len(recent_s) if recent_s else None


def _append(values: list[T], value: T) -> None:
    values.append(value)
    if len(values) > STEPS_KEPT:
        del values[0]
