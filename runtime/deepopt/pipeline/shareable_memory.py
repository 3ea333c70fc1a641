"""Memory of this process that a worker of the same host may read where it lies, once it is told of it."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import weakref
from typing import NamedTuple

import torch

from deepopt.pipeline.same_host_memory import mapped

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a tensor lies.

    Args:
        number: of the memory; no other of this process has it.
        descriptor: of the memory; stays this module's.
        offset: of the tensor's first byte.
    """

    number: int
    descriptor: int
    offset: int


_lock = threading.Lock()  # of the next
_by_address: dict[int, tuple[int, int]] = {}  # number and descriptor by first address
_numbers = itertools.count()


def shareable_bytes(size_bytes: int) -> torch.Tensor:
    """Uninitialised bytes that `place_of` finds; ordinary ones where the system refuses such memory.

    Args:
        size_bytes: how many.
    """
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        descriptor = os.memfd_create("deepopt-states", os.MFD_CLOEXEC)
    except OSError as error:
        logger.info("states lie in memory that is not shared: %s", error)
        return torch.empty(size_bytes, dtype=torch.uint8)
    try:
        os.ftruncate(descriptor, size_bytes)
        memory = mapped(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    address = tensor.data_ptr()
    with _lock:
        _by_address[address] = next(_numbers), descriptor
    weakref.finalize(memory.obj, _forget, address, descriptor).atexit = False
    return tensor


def place_of(tensor: torch.Tensor) -> Place | None:
    """Where a contiguous tensor lies in shareable memory; None if it does not.

    Args:
        tensor: of the CPU.
    """
    address = tensor.untyped_storage().data_ptr()
    with _lock:
        found = _by_address.get(address)
    return None if found is None else Place(*found, tensor.data_ptr() - address)


def _forget(address: int, descriptor: int) -> None:
    with _lock:
        del _by_address[address]
    os.close(descriptor)
