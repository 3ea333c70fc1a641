"""Watches the operations below a recorder's calls: random draws, floating-point work, and which
memory was made where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from deepopt.convert.structure import leaves

# Operation -> its floating-point operations by shapes. torch's table lacks the CPU's attention.
_COUNTS: Mapping[Any, Callable[..., Any]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a forward, also those inside modules that are kept whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._call: str | None = None
        self._drew = False
        self._flops = 0
        self._makers: dict[int, str] = {}  # storage -> call that made it

    def begin(self, call: str | None) -> None:
        """A call starts.

        Args:
            call: path of the module; None for a function.
        """
        self._call = call
        self._drew, self._flops = False, 0

    def end(self) -> tuple[bool, int]:
        """Whether the call drew random numbers, and its floating-point operations."""
        self._call = None
        return self._drew, self._flops

    def maker_of(self, tensor: torch.Tensor) -> str | None:
        """The call that made a tensor's memory; None when it was there before the forward."""
        return self._makers.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drew = True
        result = func(*args, **kwargs)
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            self._flops += int(count(*args, **kwargs, out_val=result))
        before = _storages((args, kwargs))
        for storage in _storages(result) - before:
            self._makers[storage] = self._call or "a torch function"
        return result


def _storages(value: Any) -> set[int]:
    return {
        leaf.untyped_storage()._cdata
        for leaf in leaves(value)
        if isinstance(leaf, torch.Tensor)
    }
