"""The loss of a job: the job's, else the model's own, else cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.errors import InputError, TrainingError
from deepopt.import_path import import_object
from deepopt.pipeline.stage import Loss


def find_loss(job: JobConfig, model: torch.nn.Module) -> Loss:
    """The loss of (output, targets): `model.loss` of the job, else of the model, else what the
    model returned as `loss`, else cross-entropy of its logits.

    Raises:
        InputError: the import path does not lead to a callable.
    """
    if job.model.loss is not None:
        loss: Callable[..., torch.Tensor] = import_object(job.model.loss, field="model.loss")
        if not callable(loss):
            raise InputError(f"model.loss: {job.model.loss} is not callable")
        return partial(loss, **job.model.loss_kwargs) if job.model.loss_kwargs else loss
    own = getattr(model, "loss", None)
    return own if callable(own) else default_loss


def default_loss(output: Any, targets: torch.Tensor) -> torch.Tensor:
    """What a model's output says of itself.

    Args:
        output: logits [..., classes]; or a tuple that starts with them; or a dict or object with
            `loss` (a scalar, used as it is) or `logits`.
        targets: [...] class of each; not used when the output has a loss.

    Raises:
        TrainingError: the output has neither.
    """
    loss = _entry(output, "loss")
    if loss is not None:
        return loss
    logits = _entry(output, "logits")
    if logits is None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, torch.Tensor):
            raise TrainingError(
                f"the model returned a {type(output).__name__} without loss or logits",
                remedy="name a loss(output, targets) in model.loss",
            )
        logits = first
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def _entry(output: Any, name: str) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor | tuple | list):
        return None
    value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
    return value if isinstance(value, torch.Tensor) else None
