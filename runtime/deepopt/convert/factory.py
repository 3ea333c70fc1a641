"""Calls a job's model factory, with memory or without, and gives its routers and
linear maps the job's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepopt.config import JobConfig, PrecisionConfig
from deepopt.convert.fp8_linears import NONE, Fp8Choice, set_fp8_linears
from deepopt.errors import DeepoptError, InputError
from deepopt.import_path import describe_raise, import_object
from deepopt.moe.configure import configure_routers


def build_model(job: JobConfig, *, device: str) -> torch.nn.Module:
    """Call the model factory.

    Args:
        job: names the factory and its arguments.
        device: `meta` for the structure alone, `cpu` for real values.

    Raises:
        InputError: the factory fails, or returns no module.
    """
    factory = import_object(job.model.factory, field="model.factory")
    try:
        with torch.device(device), _NoRandomFill() if device == "meta" else nullcontext():
            model = factory(**job.model.kwargs)
    except DeepoptError:
        raise
    except Exception as error:
        raise InputError(
            f"model.factory: {job.model.factory} raised {describe_raise(error)}",
            remedy=f"check model.kwargs ({dict(job.model.kwargs)}); the factory must also work "
            "under torch.device('meta')",
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"model.factory: {job.model.factory} returned {type(model).__name__}, "
            "not a torch.nn.Module",
            remedy="return the model itself from the factory",
        )
    configure_routers(model, job.elb, devices=job.parallel.expert)
    set_precision(model, job.precision)
    return model


def set_precision(model: torch.nn.Module, precision: PrecisionConfig) -> Fp8Choice | None:
    """Let linear maps compute in the format that a job says; again with the same result.

    Args:
        model: changed in place.
        precision: of the job.

    Returns:
        What computes in FP8; None where the job leaves that to the model.

    Raises:
        InputError: a pattern names no linear map, or none would be left.
    """
    if precision.fp8 == NONE:
        return None
    return set_fp8_linears(
        model,
        include=precision.fp8_include,
        exclude=precision.fp8_exclude,
        section="precision.",
    )


class _NoRandomFill(TorchFunctionMode):
    """Leaves initial values out: on the meta device there are none to set.

    Not only to save the work: the first random fill of a meta tensor imports torch's compiler,
    which takes 1 to 3 s in every process.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        fills = func in _RANDOM_FILLS or (
            getattr(func, "__module__", "") == "torch.nn.init" and func.__name__.endswith("_")
        )
        if fills:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_RANDOM_FILLS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "exponential_", "bernoulli_", "log_normal_", "random_")
)
