"""Memory that two workers of one host share, for tensors to pass through.

The sender makes the memory (`memfd_create`: it has no name, so nothing is left behind whatever ends a
process, and it does not count against the size of /dev/shm), copies tensors into it, and the receiver
uses them where they are. The first byte of a slot says whether it is taken; the receiver clears it when
nobody refers to the tensors any more, so no consumer has to give anything back. A mapping lives as
long as a tensor in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from deepopt.pipeline.transport import TensorSpec

ALIGNMENT_BYTES = 64  # a cache line; of each tensor, and of the place of the first byte
_TAKEN = 1
_FREE = 0
_OWN_REFERENCES = 2  # to a storage: that of the tensor kept here, and that of who counts them
_MAP_FAILED = ctypes.c_void_p(-1).value

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

Layout = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and type of each tensor of a message."""


def layout_of(tensors: Sequence[torch.Tensor | TensorSpec]) -> Layout:
    """The layout of a message.

    Args:
        tensors: or what is known of them.
    """
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)


def size_of(layout: Layout) -> int:
    """Bytes that a message takes in a slot, without the first line.

    Args:
        layout: of its tensors.
    """
    return sum(_aligned(_num_bytes(shape, dtype)) for shape, dtype in layout)


class Slot:
    """A piece of shared memory that takes one message at a time.

    Args:
        memory: mapped by this process.
        number: that the sender gave it.
    """

    __slots__ = ("_views", "memory", "number")

    def __init__(self, memory: memoryview, number: int) -> None:
        self.memory = memory
        self.number = number
        self._views: dict[Layout, _Views] = {}

    def views(self, layout: Layout) -> _Views:
        """The tensors of a message in this slot; made once.

        Args:
            layout: of the message.
        """
        found = self._views.get(layout)
        if found is None:
            tensors = tensors_in(self.memory, layout)
            storages = tuple(tensor.untyped_storage()._cdata for tensor in tensors)
            found = self._views[layout] = _Views(tensors, storages)
        return found

    def free(self) -> None:
        """Let the sender use the slot again."""
        self.memory[0] = _FREE


class _Views(NamedTuple):
    """Tensors in a slot and the addresses of their storages: to make a storage's Python object at each look
    would cost more than the look."""

    tensors: tuple[torch.Tensor, ...]
    storages: tuple[int, ...]


class OutgoingSlots:
    """The slots of one sender to one receiver. As many as are ever taken at once; the lowest that is free is
    used again, as it is the likeliest to be in a cache."""

    def __init__(self) -> None:
        self._by_capacity: dict[int, list[Slot]] = {}
        self.num_slots = 0

    def take(self, size_bytes: int) -> tuple[Slot, int | None]:
        """A slot that nobody uses, and its descriptor if the receiver has not seen it yet: to be sent and
        closed.

        Args:
            size_bytes: of a message.

        Raises:
            OSError: there is no memory.
        """
        capacity = _capacity(size_bytes)
        slots = self._by_capacity.get(capacity)
        if slots is None:
            slots = self._by_capacity[capacity] = []
        for slot in slots:
            if not slot.memory[0]:
                slot.memory[0] = _TAKEN
                return slot, None
        slot, descriptor = new_slot(size_bytes, number=self.num_slots)
        self.num_slots += 1
        slots.append(slot)
        return slot, descriptor


class IncomingSlots:
    """The slots of one sender, at the receiver."""

    def __init__(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._used: list[tuple[Slot, tuple[int, ...]]] = []

    def add(self, number: int, descriptor: int) -> None:
        """Map a slot that was made.

        Args:
            number: of the slot.
            descriptor: of its memory; stays open.
        """
        self._slots[number] = Slot(mapped(descriptor), number)

    def __getitem__(self, number: int) -> Slot:
        """A slot by its number."""
        return self._slots[number]

    def hand_out(self, number: int, layout: Layout) -> tuple[torch.Tensor, ...]:
        """The tensors of a message that has come; the slot is free again when nobody has them.

        Args:
            number: of the slot.
            layout: of the message.
        """
        slot = self._slots[number]
        views = slot.views(layout)
        self._used.append((slot, views.storages))
        return tuple(tensor.data for tensor in views.tensors)  # their versions begin anew

    def free_unused(self) -> None:
        """Give back what nobody refers to any more."""
        references = torch._C._storage_Use_Count
        still = []
        for used in self._used:
            for storage in used[1]:
                if references(storage) > _OWN_REFERENCES:
                    still.append(used)
                    break
            else:
                used[0].free()
        self._used = still


def new_slot(size_bytes: int, *, number: int) -> tuple[Slot, int]:
    """A new slot, which is taken, and its descriptor.

    Args:
        size_bytes: of a message.
        number: of the slot.

    Raises:
        OSError: there is no memory.
    """
    descriptor = os.memfd_create("deepopt-tensors", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _capacity(size_bytes))
        slot = Slot(mapped(descriptor), number)
    except BaseException:
        os.close(descriptor)
        raise
    slot.memory[0] = _TAKEN
    return slot, descriptor


def mapped(descriptor: int) -> memoryview:
    """All of a shared memory, with its pages in place: one call instead of a fault for each. It is unmapped
    when nothing refers to the view, or to a view or tensor made of it.

    Python's own `mmap` would keep a descriptor open for each (until 3.13), and there may be thousands.

    Args:
        descriptor: of the memory; may be closed afterwards.

    Raises:
        OSError: there is no memory.
    """
    size = os.fstat(descriptor).st_size
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_POPULATE
    address = _LIBC.mmap(None, size, protection, flags, descriptor, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # Not at the end of the process: tensors in it may be used until the very end, and it goes with them.
    weakref.finalize(memory, _LIBC.munmap, address, size).atexit = False
    return memoryview(memory).cast("B")


def tensors_in(memory: memoryview, layout: Layout) -> tuple[torch.Tensor, ...]:
    """The tensors of a message, each with a storage of its own that is its part of the memory.

    Args:
        memory: of a slot.
        layout: of the message.
    """
    tensors = []
    offset = ALIGNMENT_BYTES
    for shape, dtype in layout:
        size = _num_bytes(shape, dtype)
        if size:
            flat = torch.frombuffer(
                memory, dtype=dtype, count=size // dtype.itemsize, offset=offset
            )
            tensors.append(flat.view(shape).data)  # a view would refer to `flat` for ever
        else:
            tensors.append(torch.empty(shape, dtype=dtype))
        offset += _aligned(size)
    return tuple(tensors)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _capacity(size_bytes: int) -> int:
    """Bytes of the slot for a message: whole pages."""
    return -(-(ALIGNMENT_BYTES + size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
