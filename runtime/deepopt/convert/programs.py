"""From a model and example inputs to the programs of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from deepopt.convert.graph import Recording
from deepopt.convert.record import record
from deepopt.convert.units import modules_kept_whole
from deepopt.errors import InputError


def record_as_trained(
    model: torch.nn.Module,
    *,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    training: bool = True,
) -> Recording:
    """Record a forward in train or in eval mode. The model is left as it was.

    A forward that can keep a cache (`use_cache`, as an argument or in a module's `config`) is told
    not to: it would carry tensors past the layers, and training has no use for one.

    Args:
        model: on one device, or on `meta`.
        args: of the forward.
        kwargs: of the forward.
        dtype: that parameters have in training; None: as they are.
        training: the mode.

    Raises:
        InputError: the forward raised, or does what a chain of layers cannot do.
    """
    named = dict(kwargs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        named.setdefault("use_cache", False)
    with (
        _as_trained(model, dtype, training=training),
        _without_cache(model),
        _restored_buffers(model) as written,
    ):
        recording = record(model, whole=modules_kept_whole(model), args=args, kwargs=named)
    return replace(recording, written=frozenset(written))


@contextmanager
def _as_trained(
    model: torch.nn.Module, dtype: torch.dtype | None, *, training: bool
) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        model.train(training)
        if dtype is not None:
            for parameter, value in values:
                if value.is_floating_point():
                    parameter.data = value.to(dtype)
        yield
    finally:
        for module, training in modes:
            module.training = training
        if dtype is not None:
            for parameter, value in values:
                parameter.data = value


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Configurations of Hugging Face models, of which wrappers (adapters) hide the argument."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(c): c for c in found if getattr(c, "use_cache", None) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


@contextmanager
def _restored_buffers(model: torch.nn.Module) -> Iterator[set[str]]:
    """Undo what a forward does to buffers; the set holds the names of those it wrote to.

    Raises:
        InputError: the forward put another tensor in a buffer's place.
    """
    before = [
        (path, module, name, buffer, buffer._version, buffer.detach().clone())
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    written: set[str] = set()
    try:
        yield written
    finally:
        written.update(
            f"{path}.{name}".lstrip(".")
            for path, _, name, buffer, version, _ in before
            if buffer._version != version
        )
        replaced = [
            f"{path}.{name}".lstrip(".")
            for path, module, name, buffer, _, _ in before
            if module._buffers.get(name) is not buffer
            and name not in module._non_persistent_buffers_set
        ]
        for _, module, name, buffer, _, value in before:
            module._buffers[name] = buffer
            if not buffer.is_meta:
                with torch.no_grad():
                    buffer.copy_(value)
    if replaced:
        raise InputError(
            f"the forward of {type(model).__name__} puts another tensor in the place of buffer "
            f"{replaced[0]}",
            remedy="change the buffer in place: add_(), copy_()",
        )
