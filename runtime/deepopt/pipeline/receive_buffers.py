"""Memory that received tensors lie in, used again when nobody refers to it any more.

A pipeline receives the same few shapes in every step. Each buffer is handed out as a tensor of its own
(its version counter begins anew); it is free again when no tensor, view or graph refers to its storage,
so no consumer has to give anything back, and what a model keeps for itself is never overwritten.
On a GPU a buffer comes with the moment of the compute stream at which it was found free: who
receives into it has its own stream wait for that moment, and no thread waits for anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

from deepopt.pipeline.transport import TensorSpec

Mark = TypeVar("Mark")
"""A moment of the compute stream."""

_Key = tuple[tuple[int, ...], torch.dtype]

_OWN_REFERENCES = 2  # to the storage of a buffer: the buffer's, and that of who counts them


class _Buffer(NamedTuple):
    """A tensor and the address of its storage: to make the storage's Python object at each look would cost
    more than all else here."""

    tensor: torch.Tensor
    storage: int


class ReceiveBuffers(Generic[Mark]):
    """The buffers of one worker.

    Args:
        allocate: makes the memory of a spec; nobody else refers to it.
        mark: the present moment of the stream on which received tensors are used.
    """

    def __init__(
        self, *, allocate: Callable[[TensorSpec], torch.Tensor], mark: Callable[[], Mark]
    ) -> None:
        self._allocate = allocate
        self._mark = mark
        self._used: dict[_Key, list[_Buffer]] = {}
        self._free: dict[_Key, deque[tuple[_Buffer, Mark]]] = {}
        self.num_buffers = 0

    def take(self, spec: TensorSpec) -> tuple[torch.Tensor, Mark | None]:
        """A contiguous tensor that nobody else refers to, and the moment from which on it may be
        written to; None for at once.

        Args:
            spec: of what is received.
        """
        key = (spec.shape, spec.dtype)
        if key not in self._used:
            self._used[key], self._free[key] = [], deque()
        used, free = self._used[key], self._free[key]
        references = torch._C._storage_Use_Count
        ended = [b for b in used if references(b.storage) <= _OWN_REFERENCES]
        if ended:
            now = self._mark()
            storages = {buffer.storage for buffer in ended}
            used[:] = [buffer for buffer in used if buffer.storage not in storages]
            free.extend((buffer, now) for buffer in ended)
        if free:  # the one that has been free for longest: its moment is over, most likely
            buffer, since = free.popleft()
            used.append(buffer)
            return buffer.tensor.data, since
        tensor = self._allocate(spec)
        self.num_buffers += 1
        used.append(_Buffer(tensor, tensor.untyped_storage()._cdata))
        return tensor.data, None

    def forget(self) -> None:
        """Leave all buffers to who refers to them: a backend may still write to some."""
        self._used.clear()
        self._free.clear()
        self.num_buffers = 0
