"""A module whose tied parameters are, while it runs, leaves of its own with the same memory.

Autograd then keeps the gradients of each use of a tied weight apart, and whoever sums them does it in an
order that does not depend on which layers share a stage. Outside its calls the model is as it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class SeparateUses(torch.nn.Module):
    """A module with stand-ins for some of its parameters.

    Args:
        module: whose calls these are; other modules may share it or its parts.
        tied: the parameters that get a stand-in, by each name that they have in `module`.
    """

    def __init__(self, module: torch.nn.Module, tied: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__()
        self.module = module
        stand_ins = {
            id(parameter): torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in tied.values()
        }
        self._places: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        for name in tied:
            owner, _, attribute = name.rpartition(".")
            stand_in = stand_ins[id(tied[name])]
            self._places.append((module.get_submodule(owner), attribute, stand_in))

    def forward(self, *values: Any) -> Any:
        """What the module gives."""
        with self._in_place():
            return self.module(*values)

    def named_parameters(
        self, *args: Any, **kwargs: Any
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The module's, with the stand-ins for those that have one."""
        with self._in_place():
            named = list(super().named_parameters(*args, **kwargs))
        yield from named

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        originals = [getattr(owner, attribute) for owner, attribute, _ in self._places]
        try:
            for (owner, attribute, stand_in), original in zip(
                self._places, originals, strict=True
            ):
                if stand_in.data_ptr() != original.data_ptr():  # somebody gave it other memory
                    stand_in.data = original.data
                setattr(owner, attribute, stand_in)
            yield
        finally:
            for (owner, attribute, _), original in zip(self._places, originals, strict=True):
                setattr(owner, attribute, original)
