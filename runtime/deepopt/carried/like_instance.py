"""A factory of optimizers like one that a script has made: same class, same groups, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepopt.errors import InputError

_OF_GROUP = ("params", "param_names", "initial_lr")


class LikeInstance:
    """Makes optimizers of layers with the settings of an optimizer over a whole model.

    Args:
        optimizer: over parameters of the model; not trained yet.
        model: names them.

    Raises:
        InputError: it does not know a parameter that takes gradients, knows others than the model's, or
            has trained already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        if any(optimizer.state.values()):
            raise InputError(
                f"optimizer: the {type(optimizer).__name__} has trained already, and its state would be "
                "lost",
                remedy="give a new one; resume_from= goes on with the state of an earlier fit",
            )
        self._kind = type(optimizer)
        self._groups = [
            {key: value for key, value in group.items() if key not in _OF_GROUP}
            for group in optimizer.param_groups
        ]
        group_of = {
            id(parameter): index
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        own = {id(parameter) for parameter in model.parameters()}
        strange = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in own]
        if strange:
            raise InputError(
                f"optimizer: {len(strange)} parameter(s) of the {type(optimizer).__name__} are none of the "
                f"model's, the first of shape {list(strange[0].shape)}",
                remedy="make the optimizer of model.parameters(), of the model that is trained",
            )
        self._group_of: dict[str, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in group_of:
                self._group_of[name] = group_of[id(parameter)]
            elif parameter.requires_grad:
                raise InputError(
                    f"optimizer: the {type(optimizer).__name__} does not know parameter {name}",
                    remedy="make it of model.parameters(), or freeze the parameter: "
                    "requires_grad_(False)",
                )

    def __call__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """An optimizer of a layer's (name, parameter) pairs; groups may be empty."""
        groups: list[dict[str, Any]] = [{**group, "params": []} for group in self._groups]
        for name, parameter in parameters:
            own = name.partition("#")[0]  # a further use of the same parameter
            groups[self._group_of[own]]["params"].append(parameter)
        make: Any = self._kind
        made: torch.optim.Optimizer = make(groups, **self._arguments())
        return made

    def _arguments(self) -> Mapping[str, Any]:
        """What the class cannot be called without; groups say it again."""
        return {"lr": self._groups[0]["lr"]} if "lr" in self._groups[0] else {}
