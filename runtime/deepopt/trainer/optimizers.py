"""From `optimizer=` and `lr_scheduler=` of a trainer to the optimizer section of its job."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepopt.carried.like_instance import LikeInstance
from deepopt.carried.object_file import dump_object
from deepopt.config import OptimizerConfig
from deepopt.errors import InputError

_REMEDY = (
    "give a class of torch.optim with optimizer_kwargs, a function of a layer's (name, parameter) "
    "pairs, an optimizer over model.parameters(), an OptimizerConfig, or a mapping of its fields"
)


def optimizer_fields(
    optimizer: Any,
    *,
    kwargs: Mapping[str, Any] | None,
    scheduler: Any,
    scheduler_kwargs: Mapping[str, Any] | None,
    model: torch.nn.Module,
    folder: Path,
) -> dict[str, Any]:
    """The optimizer section; what cannot be said in a job file is written into a folder.

    Args:
        optimizer: None: AdamW with the defaults of a job file.
        kwargs: of a class or function.
        scheduler: a class or a function of an optimizer; None: constant rates.
        scheduler_kwargs: of the scheduler.
        model: that is trained.
        folder: of what the script brings along.

    Raises:
        InputError: an argument is wrong, or cannot be carried.
    """
    if optimizer is None or isinstance(optimizer, OptimizerConfig | Mapping):
        for name, value in (("optimizer_kwargs", kwargs), ("lr_scheduler", scheduler)):
            if value is not None:
                raise InputError(
                    f"{name} is given, and optimizer is not a class or function of torch.optim",
                    remedy="give for example optimizer=torch.optim.AdamW; without one, "
                    'optimizer={"warmup_steps": 100, "decay_steps": 1000} is AdamW with a cosine',
                )
        if isinstance(optimizer, OptimizerConfig):
            return optimizer.model_dump()
        return dict(optimizer or {})
    fields: dict[str, Any] = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        if kwargs is not None:
            raise InputError(
                "optimizer_kwargs is given, and optimizer is an instance", remedy=_REMEDY
            )
        optimizer = LikeInstance(optimizer, model)
    elif not callable(optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}", remedy=_REMEDY)
    fields["factory"], fields["kwargs"] = _named(
        optimizer, kwargs, what="optimizer", folder=folder, entry="optimizer"
    )
    if scheduler is not None:
        if not callable(scheduler):
            raise InputError(
                f"lr_scheduler is a {type(scheduler).__name__}: each layer's optimizer needs one of its "
                "own",
                remedy="give a class of torch.optim.lr_scheduler with lr_scheduler_kwargs, or a function "
                "of an optimizer",
            )
        fields["scheduler"], fields["scheduler_kwargs"] = _named(
            scheduler, scheduler_kwargs, what="lr_scheduler", folder=folder, entry="scheduler"
        )
    elif scheduler_kwargs is not None:
        raise InputError(
            "lr_scheduler_kwargs is given without lr_scheduler", remedy="give lr_scheduler="
        )
    return fields


def _named(
    function: Any, kwargs: Mapping[str, Any] | None, *, what: str, folder: Path, entry: str
) -> tuple[str, dict[str, Any]]:
    """An import path and arguments: the function's own where it has one, else of what is carried."""
    given = dict(kwargs or {})
    path = _import_path(function)
    if path is not None and _is_json(given):
        return path, given
    carried = dump_object((function, given), folder / f"{entry}.pkl", what=what)
    return f"deepopt.carried:{entry}", dict(carried)


def _import_path(function: Any) -> str | None:
    """`torch.optim.sgd:SGD`; None for what the script defines or wraps itself."""
    module, name = (
        getattr(function, "__module__", None),
        getattr(function, "__qualname__", None),
    )
    if isinstance(module, str) and module.startswith("torch.") and isinstance(name, str):
        return None if "<" in name else f"{module}:{name}"
    return None


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)  # a tuple would come back as a list
    except (TypeError, ValueError):
        return False
