"""Any `torch.optim` optimizer over one layer, with the state of a layer: keyed by parameter, whole at
any time.

An optimizer makes its state at its first update. Here the fields are found out beforehand, on a copy
without values, so that what is exported has the same keys and shapes before and after: a flag a
parameter says whether its state exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deepopt.errors import InputError
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.stage import Layer

Factory = Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]

_EXISTS = "exists"  # field of the flag; no optimizer of torch has one of that name


class TorchOptimizer(LayerOptimizer):
    """An optimizer of torch over the fp32 masters of one layer.

    Args:
        layer: as for `LayerOptimizer`.
        factory: makes the optimizer of (name, parameter) pairs.
        name: of the factory, for errors.

    Attributes:
        optimizer: None where the layer has nothing to train.

    Raises:
        InputError: the factory fails, or its optimizer cannot work layer by layer.
    """

    def __init__(self, layer: Layer, factory: Factory, *, name: str) -> None:
        super().__init__(layer)
        self.optimizer: torch.optim.Optimizer | None = None
        self._fields: dict[str, dict[str, torch.Tensor]] = {}
        if not self._masters:
            return
        self.optimizer = make_optimizer(factory, self._masters, name=name)
        self._fields = _fields_of(factory, self._masters, name=name)

    def step(self, grads: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """Update the layer.

        Args:
            grads: fp32, by parameter name, already clipped.
            learning_rate: not used: the optimizer's groups have their own.
        """
        if self.optimizer is None:
            return
        before = {name: master.grad for name, master in self._masters.items()}
        for name, master in self._masters.items():
            master.grad = grads[name]
        try:
            self.optimizer.step()
        finally:
            for name, master in self._masters.items():
                master.grad = before[name]
        self._copy_masters()

    def restore(self) -> None:
        """Make the layer what it was at the last `save`, bit for bit."""
        super().restore()
        assert self._saved is not None, "restore() before save()"
        moments = self._moments()
        fields = [(name, field) for name, fields in moments.items() for field in fields]
        saved = self._saved[len(self._saved) - len(fields) :]
        for (name, field), value in zip(fields, saved, strict=True):
            moments[name][field] = value
        with torch.no_grad():
            self._set_moments(moments)

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """Live tensors where the state exists, zeros where it does not yet."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, fields in self._fields.items():
            state = self._state_of(name)
            found[name] = {_EXISTS: torch.tensor(float(bool(state)))}
            for field, like in fields.items():
                value = state.get(field)
                if value is None:
                    value = torch.zeros_like(like, device=_device(like, self._masters[name]))
                elif not isinstance(value, torch.Tensor):
                    value = torch.tensor(value, dtype=like.dtype)
                found[name][field] = value
        return found

    def _set_moments(self, moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, fields in self._fields.items():
            own, given = self._state_of(name), moments[name]
            if not given[_EXISTS].item():
                own.clear()
                continue
            for field, like in fields.items():
                present, value = own.get(field), given[field]
                if isinstance(present, torch.Tensor):
                    present.copy_(value)
                elif getattr(like, "python_number", False):
                    own[field] = value.item()
                else:
                    home = _device(like, self._masters[name])
                    own[field] = value.to(device=home, dtype=like.dtype, copy=True).contiguous()

    def _state_of(self, name: str) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        state: dict[str, Any] = self.optimizer.state[self._masters[name]]
        return state


def make_optimizer(
    factory: Factory, parameters: Mapping[str, torch.nn.Parameter], *, name: str
) -> torch.optim.Optimizer:
    """Call a factory and check what it made.

    Args:
        factory: of (name, parameter) pairs.
        parameters: of a layer; at least one.
        name: of the factory, for errors.

    Raises:
        InputError: it fails, returns no optimizer, or one that leaves a parameter out or cannot work
            layer by layer.
    """
    first = next(iter(parameters))
    try:
        optimizer = factory(list(parameters.items()))
    except InputError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"optimizer: {name} raised {type(error).__name__}: {error} (for {first} and the other "
            "parameters of its layer)",
            remedy="it is called once for each layer, with (name, parameter) pairs",
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"optimizer: {name} returned a {type(optimizer).__name__}, not an optimizer",
            remedy="return a torch.optim.Optimizer over the parameters that it is given",
        )
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise InputError(
            f"optimizer: {type(optimizer).__name__} cannot train a pipeline: it "
            + (
                "calls the model again and again within a step"
                if isinstance(optimizer, torch.optim.LBFGS)
                else "wants sparse gradients"
            ),
            remedy="take another one of torch.optim",
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for own, parameter in parameters.items():
        if id(parameter) not in known:
            raise InputError(
                f"optimizer: {name} does not know parameter {own}",
                remedy="give it to the optimizer, or freeze it: requires_grad_(False)",
            )
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None:
            group["foreach"] = False  # one implementation everywhere
    return optimizer


def _fields_of(
    factory: Factory, masters: Mapping[str, torch.nn.Parameter], *, name: str
) -> dict[str, dict[str, torch.Tensor]]:
    """What the state of each parameter will hold: tensors without values of the right kind."""
    try:
        return _after_a_step(factory, masters, name=name, device="meta")
    except (RuntimeError, NotImplementedError):  # it looks at values
        return _after_a_step(factory, masters, name=name, device="cpu")


def _after_a_step(
    factory: Factory, masters: Mapping[str, torch.nn.Parameter], *, name: str, device: str
) -> dict[str, dict[str, torch.Tensor]]:
    twins = {
        own: torch.nn.Parameter(torch.zeros(master.shape, device=device))
        for own, master in masters.items()
    }
    optimizer = make_optimizer(factory, twins, name=name)
    for twin in twins.values():
        twin.grad = torch.zeros_like(twin)
    optimizer.step()
    return {
        own: {
            field: _like(value, where=f"{name}: state {field!r} of {own}")
            for field, value in optimizer.state[twin].items()
            if value is not None
        }
        for own, twin in twins.items()
    }


def _like(value: Any, *, where: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        on_device = value.is_meta or value.dim() > 0
        like = torch.empty(value.shape, dtype=value.dtype, device="meta")
        like.on_device = on_device  # type: ignore[attr-defined]
        return like
    if isinstance(value, int | float):
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        like = torch.empty((), dtype=dtype, device="meta")
        like.python_number = True  # type: ignore[attr-defined]
        return like
    raise InputError(
        f"optimizer: {where} is a {type(value).__name__}, which no checkpoint can hold",
        remedy="take an optimizer whose state is tensors and numbers",
    )


def _device(like: torch.Tensor, master: torch.Tensor) -> torch.device:
    """Steps and other scalars stay on the CPU, where torch keeps them."""
    return master.device if getattr(like, "on_device", False) else torch.device("cpu")
