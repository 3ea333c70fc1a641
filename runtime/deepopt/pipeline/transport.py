"""What a transport between workers is: posted receives, sends that do not block, one small all-gather.

One set of calls for gloo and NCCL (`process_group`), for emulated links (`emulated_transport`), and for
a worker that has nobody to talk to (`lone_transport`). It knows nothing of schedules.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

Store = dist.distributed_c10d.Store


class Kind(enum.IntEnum):
    """What a message carries; each kind has channels of its own."""

    ACTIVATION = 0
    GRADIENT = 1
    REDUCTION = 2
    STATE = 3


@dataclass(frozen=True, slots=True)
class Channel:
    """A one-way road between two workers for one kind of message.

    Args:
        kind: what it carries.
        source: sending rank in the world.
        target: receiving rank in the world.
    """

    kind: Kind
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver must know before it can post a receive.

    Args:
        shape: of the tensor.
        dtype: of the tensor; the wire keeps it.
        requires_grad: whether a gradient comes back for it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


class PendingReceive(Protocol):
    """A posted receive."""

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Block until all tensors are here: contiguous, in storage that is theirs alone for as long as
        anything refers to it."""
        ...


class PendingGather(Protocol):
    """An exchange under way."""

    def wait(self) -> list[list[float]]:
        """Every rank's values by rank, as exact fp64."""
        ...


class Pending(Protocol):
    """Something posted."""

    def wait(self) -> None:
        """Block until it is done."""
        ...


class Transport(Protocol):
    """How a worker talks to its peers.

    Args of the constructor are the backend's own. All calls come from the training thread, but for
    `interrupt`, `send_apart` and `receive_into`.
    """

    @property
    def rank(self) -> int:
        """This worker's rank in the world."""
        ...

    @property
    def world_size(self) -> int:
        """Workers in the world."""
        ...

    def open(self, channels: Iterable[Channel]) -> None:
        """Make the communicators of the channels this worker takes part in."""
        ...

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        """Post a receive and return at once."""
        ...

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        """Post a send and return at once; the tensors must not be written to afterwards."""
        ...

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        """Post a send and return at once; until what is returned was waited for, the tensors must not
        be written to. `finish_sends` does not wait for it."""
        ...

    def finish_sends(self) -> None:
        """Block until every posted send is out."""
        ...

    def send_apart(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Post a send of a CPU tensor that `finish_sends` does not wait for. From any thread."""
        ...

    def receive_into(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Post a receive into a contiguous CPU tensor. From any thread."""
        ...

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        """Post an exchange of every rank's values and return at once; all give the same number
        of them, and post their exchanges in one order."""
        ...

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        """Tell whoever asks under this key what the tensors will look like."""
        ...

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        """Block until the key was published."""
        ...

    def join(self, store: Store, *, generation: int) -> None:
        """Form the group of a generation; of a later one, again, with the same channels.

        Args:
            store: prefixed with the generation.
            generation: which; higher than the one before.

        Raises:
            TransportError: the group did not form in time, or was interrupted.
        """
        ...

    def interrupt(self, generation: int) -> None:
        """Make every wait in a generation fail at once, here and at the peers. From any thread.

        Args:
            generation: which; nothing happens to a later one.
        """
        ...

    def cut(self) -> None:
        """Break all connections to the peers, as a network does that fails: nobody is told. For
        drills."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...
