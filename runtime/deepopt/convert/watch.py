"""Watches the operations below a recorder's calls: random draws, floating-point work, and which
memory was made where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepopt.convert.structure import leaves


@cache
def _counts() -> Mapping[Any, Callable[..., Any]]:
    """Operation -> its floating-point operations by shapes."""
    # It imports triton: 0.3 s of CPU time in each worker, which as a rule records nothing.
    from torch.utils.flop_counter import flop_registry

    attention = torch.ops.aten._scaled_dot_product_flash_attention
    # torch's table lacks the CPU's attention.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {**flop_registry, on_cpu: flop_registry[attention]}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a forward, also those inside modules that are kept whole."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = _counts()
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
        count = self._counts.get(func._overloadpacket)
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
