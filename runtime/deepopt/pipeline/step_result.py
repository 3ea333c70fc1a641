"""What a step came to: what workers tell each other at its end, and what each of them then knows."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepopt.errors import TrainingError
from deepopt.pipeline.spans import Span


class Wish(enum.IntFlag):
    """What somebody asked a worker for; all workers act on it after the same step."""

    NONE = 0
    STOP = 1
    CHECKPOINT = 2
    BUSY = 8  # copies for peers are still under way
    LEAVE = 16  # the group is about to form anew, with other workers
    WAIT = 4  # do not run ahead: this worker's data cannot be asked for twice


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """Seconds of one worker's step; `update_s` is of the step before, known only after the
    exchange."""

    step_s: float
    compute_s: float
    wait_s: float
    send_s: float
    reduce_s: float
    update_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNumbers:
    """What is wrong with the numbers of a step.

    Args:
        step: the step.
        what: the values, in words.
        layer: the first layer whose output was not finite; None where all were, or nobody looked.
        rank: the worker that has it.
    """

    step: int
    what: str
    layer: str | None = None
    rank: int | None = None

    def error(self, *, again: bool) -> TrainingError:
        """The error that ends the job.

        Args:
            again: whether the step was computed twice, and both times came out so.
        """
        where = f", first in the output of layer {self.layer} on rank {self.rank}"
        return TrainingError(
            f"step {self.step}: {self.what}{where if self.layer else ''}; the update was not applied"
            + (", and computing the step again came out bad as well" if again else ""),
            remedy="lower optimizer.learning_rate, lengthen optimizer.warmup_steps, resume from a "
            "checkpoint before this step, or set faults.bad_step to skip",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What every worker knows after a step.

    Args:
        loss: mean over the step's micro-batches.
        grad_norm: global norm before clipping.
        learning_rate: used in the update.
        wishes: of all workers together.
        times: by rank.
        spans: of this worker, with those of the next step that ran ahead.
        clipped: whether the gradients were scaled down.
        ran_ahead: whether the next step was begun before this one's norms were known.
        rolled_back: whether that was taken back, because the gradients had to be clipped.
        bad: what was wrong with its numbers, where it was left out or computed again.
        skipped: whether it was left out: no update was made.
        experts: how evenly experts were loaded, by name of the figure; empty without experts.
        expert_loads: (layer, tokens of each expert) of this worker's routers, where it is the first
            holder of the layer.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    wishes: Wish
    times: tuple[RankTimes, ...]
    spans: list[Span]
    clipped: bool
    ran_ahead: bool = False
    rolled_back: bool = False
    bad: BadNumbers | None = None
    skipped: bool = False
    experts: Mapping[str, float] = field(default_factory=dict)
    expert_loads: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The exchange at the end of a step: all that the workers decide its update by.

    Args:
        step: the step.
        rows: of each rank, what it gave.
    """

    step: int
    rows: tuple[tuple[float, ...], ...]
