"""The transport of a job with one worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from deepopt.pipeline.transport import (
    Channel,
    Pending,
    PendingGather,
    PendingReceive,
    Store,
    TensorSpec,
)


class LoneTransport:
    """The transport of a job with one worker: nobody to send to."""

    rank = 0
    world_size = 1

    def open(self, channels: Iterable[Channel]) -> None:
        """Refuse any channel."""
        assert not list(channels), "a lone worker opened a channel"

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker received {message} on {channel}")

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker sent {message} on {channel}")

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker sent {message} on {channel}")

    def finish_sends(self) -> None:
        """Nothing to wait for."""

    def send_apart(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker sent {message} on {channel}")

    def receive_into(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker received {message} on {channel}")

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        """The caller's own values."""
        return _OwnValues(list(values))

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        """Nobody asks."""

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        """Never called: one worker has no peer."""
        raise AssertionError(f"a lone worker looked up {key}")

    def join(self, store: Store, *, generation: int) -> None:
        """Nobody to meet."""

    def interrupt(self, generation: int) -> None:
        """Nobody is waited for."""

    def cut(self) -> None:
        """There are no connections."""

    def close(self) -> None:
        """Nothing to leave."""


class _OwnValues:
    def __init__(self, values: list[float]) -> None:
        self._values = values

    def wait(self) -> list[list[float]]:
        return [self._values]
