"""Passes what a followed job says on to the view and to the user's callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deepopt.trainer.callbacks import Callback
from deepopt.trainer.progress import NoView

if TYPE_CHECKING:
    from deepopt.trainer.trainer import DeepTrainer


class Relay:
    """A view that also calls callbacks. The first error of a callback stops the job, cleanly.

    Args:
        trainer: whose fit it is.
        callbacks: of the user.
        view: shows the fit.
        steps_per_epoch: None for streams.

    Attributes:
        losses: by step.
        val_losses: of the validation set, by step.
        error: of a callback; None while there is none.
    """

    def __init__(
        self,
        trainer: DeepTrainer,
        callbacks: Sequence[Callback],
        *,
        view: NoView,
        steps_per_epoch: int | None,
    ) -> None:
        self.losses: dict[int, float] = {}
        self.val_losses: dict[int, float] = {}
        self.error: Exception | None = None
        self._trainer = trainer
        self._callbacks = callbacks
        self._view = view
        self._steps_per_epoch = steps_per_epoch

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        self._view.status(status)

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        self.losses[record["step"]] = record["loss"]
        if record.get("val_loss") is not None:
            self.val_losses[record["step"]] = record["val_loss"]
        self._view.step(record)
        self._call("on_step", record)
        if self._steps_per_epoch is not None and record["step"] % self._steps_per_epoch == 0:
            self._call("on_epoch", record["step"] // self._steps_per_epoch)

    def event(self, record: Mapping[str, Any]) -> None:
        """A line of `events.jsonl`."""
        self._view.event(record)
        self._call("on_event", record)

    def note(self, text: str) -> None:
        """A remark of the command line itself."""
        self._view.note(text)

    def close(self) -> None:
        """The job is followed no longer."""
        self._view.close()

    def _call(self, method: str, argument: Any) -> None:
        for callback in self._callbacks:
            if self.error is not None:
                return
            try:
                getattr(callback, method)(self._trainer, argument)
            except Exception as error:  # noqa: BLE001 - the user's code may raise anything
                self.error = error
                self._trainer.stop()
