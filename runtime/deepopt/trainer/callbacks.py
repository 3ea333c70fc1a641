"""What a user's code is told while a job trains. It runs in the script's process, beside training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deepopt.errors import InputError

if TYPE_CHECKING:
    from deepopt.trainer.trainer import DeepTrainer, FitResult


class Callback:
    """Base of callbacks: override what is of interest. `trainer.stop()` inside ends the run cleanly."""

    def on_start(self, trainer: DeepTrainer) -> None:
        """The job is about to start; `trainer.run_dir` is its folder."""

    def on_step(self, trainer: DeepTrainer, record: Mapping[str, Any]) -> None:
        """A step is done.

        Args:
            trainer: whose fit it is.
            record: its line of `metrics.jsonl`: `step`, `loss`, `grad_norm`, `learning_rate`, ...
        """

    def on_epoch(self, trainer: DeepTrainer, epoch: int) -> None:
        """An epoch is done; not called for streams, which do not say how long one is.

        Args:
            trainer: whose fit it is.
            epoch: from 1.
        """

    def on_event(self, trainer: DeepTrainer, event: Mapping[str, Any]) -> None:
        """Something happened: a checkpoint, a lost worker, a new generation.

        Args:
            trainer: whose fit it is.
            event: its line of `events.jsonl`.
        """

    def on_end(self, trainer: DeepTrainer, result: FitResult) -> None:
        """The run has ended well, and the weights are in the model."""


class _EachStep(Callback):
    def __init__(self, function: Callable[[Mapping[str, Any]], object]) -> None:
        self._function = function

    def on_step(self, trainer: DeepTrainer, record: Mapping[str, Any]) -> None:
        self._function(record)


def as_callbacks(given: Sequence[Any]) -> list[Callback]:
    """Callbacks, with plain functions taken as `on_step` of one record.

    Raises:
        InputError: one is neither.
    """
    found: list[Callback] = []
    for one in given:
        if isinstance(one, Callback):
            found.append(one)
        elif callable(one) and not isinstance(one, type):
            found.append(_EachStep(one))
        else:
            raise InputError(
                f"callbacks: {one!r} is neither a Callback nor a function",
                remedy="derive it from deepopt.trainer.Callback and give an instance, or give a "
                "function of the step's record",
            )
    return found
