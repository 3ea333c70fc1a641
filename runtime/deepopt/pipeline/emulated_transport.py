"""Links that are not there: messages arrive when routes of a given latency and rate would bring them.

A message carries the moment of its arrival on the emulated route: its sender knows when the route
is free, and the receiver waits for that moment. Both read the monotonic clock of one host, so
all workers have to run there.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from deepopt.errors import ClusterError
from deepopt.pipeline.emulated_clock import wait_until
from deepopt.pipeline.transport import (
    Channel,
    Kind,
    Pending,
    PendingGather,
    PendingReceive,
    Store,
    TensorSpec,
    Transport,
)

_ARRIVAL = TensorSpec((1,), torch.float64, False)  # nanoseconds: exact for 104 days of uptime
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

TransferTime = Callable[[Channel, int, Sequence[torch.Tensor]], float]
"""Seconds that a message (channel, number, tensors) occupies its route."""


class EmulatedTransport:
    """A transport whose messages take the time of emulated routes.

    Each channel (source, target, kind) is a route of its own, as in the simulator.

    Args:
        inner: carries the messages.
        latency_s: from the end of a transfer to its arrival.
        transfer_s: how long a message occupies its route.
        timed: kinds of messages that take any time; the others go the real way alone.

    Raises:
        ClusterError: workers run on several hosts.
        TransportError: a peer is gone.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        latency_s: float,
        transfer_s: TransferTime,
        timed: frozenset[Kind] = frozenset(Kind),
    ) -> None:
        self._inner = inner
        self._latency_ns = round(latency_s * 1e9)
        self._transfer_s = transfer_s
        self._timed = timed
        self._route_free_ns: dict[Channel, int] = {}
        self._check_hosts()

    @property
    def rank(self) -> int:
        """This worker's rank in the world."""
        return self._inner.rank

    @property
    def world_size(self) -> int:
        """Workers in the world."""
        return self._inner.world_size

    def open(self, channels: Iterable[Channel]) -> None:
        """Open the channels of the real transport."""
        self._inner.open(channels)

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        """Post a receive and return at once."""
        if channel.kind not in self._timed:
            return self._inner.receive(channel, message, specs)
        return _Receive(self._inner.receive(channel, message, [*specs, _ARRIVAL]))

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send at once what arrives when its route would bring it."""
        self._inner.send(channel, message, self._stamped(channel, message, tensors))

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        """As `send`; what is returned waits until it is out of this process."""
        stamped = self._stamped(channel, message, tensors)
        return self._inner.send_awaited(channel, message, stamped)

    def _stamped(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """With the moment of their arrival, if they take any time."""
        if channel.kind not in self._timed:
            return tensors
        start_ns = max(time.monotonic_ns(), self._route_free_ns.get(channel, 0))
        end_ns = start_ns + round(self._transfer_s(channel, message, tensors) * 1e9)
        self._route_free_ns[channel] = end_ns
        arrival = torch.tensor([end_ns + self._latency_ns], dtype=torch.float64)
        return [*tensors, arrival]

    def finish_sends(self) -> None:
        """Block until every posted send is out of this process; its route may still carry it."""
        self._inner.finish_sends()

    def send_apart(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Send on the real way."""
        return self._inner.send_apart(channel, message, tensor)

    def receive_into(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Receive on the real way."""
        return self._inner.receive_into(channel, message, tensor)

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        """Post an exchange that ends one latency after the last rank has posted it."""
        stamped = [*values, float(time.monotonic_ns())]
        return _Gather(self._inner.start_all_gather(stamped), self._latency_ns)

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        """Tell whoever asks under this key what the tensors will look like."""
        self._inner.publish(key, specs)

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        """Block until the key was published."""
        return self._inner.look_up(key)

    def join(self, store: Store, *, generation: int) -> None:
        """Form the real group again; its routes are free."""
        self._route_free_ns.clear()
        self._inner.join(store, generation=generation)
        self._check_hosts()

    def interrupt(self, generation: int) -> None:
        """Make every wait in a generation fail at once. From any thread."""
        self._inner.interrupt(generation)

    def cut(self) -> None:
        """Break all connections to the peers. For drills."""
        self._inner.cut()

    def close(self) -> None:
        """Leave the process group."""
        self._inner.close()

    def _check_hosts(self) -> None:
        inner = self._inner
        hosts = {row[0] for row in inner.start_all_gather([_host_number()]).wait()}
        if len(hosts) > 1:
            raise ClusterError(
                f"{inner.world_size} workers with emulated devices run on {len(hosts)} hosts, "
                "but emulated links need one clock",
                remedy="run the job on one host: leave cluster.hostfile and cluster.address out",
            )


class _Receive:
    def __init__(self, pending: PendingReceive) -> None:
        self._pending = pending

    def wait(self) -> tuple[torch.Tensor, ...]:
        *tensors, arrival = self._pending.wait()
        wait_until(int(arrival.item()))
        return tuple(tensors)


class _Gather:
    def __init__(self, pending: PendingGather, latency_ns: int) -> None:
        self._pending = pending
        self._latency_ns = latency_ns

    def wait(self) -> list[list[float]]:
        rows = self._pending.wait()
        wait_until(int(max(row[-1] for row in rows)) + self._latency_ns)
        return [row[:-1] for row in rows]


def _host_number() -> float:
    """A number that tells this start of this host from any other; exact in float64."""
    digest = hashlib.sha256(_BOOT_ID.read_bytes()).digest()
    return float(int.from_bytes(digest[:6], "big"))
