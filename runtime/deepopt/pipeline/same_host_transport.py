"""The transport of workers that share a host: CPU tensors pass through shared memory.

What has no such way goes on the transport within: to other hosts, and between GPUs.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

from deepopt.errors import TransportError
from deepopt.pipeline.posted import as_transport_error
from deepopt.pipeline.same_host_link import Backlogs, HostLink
from deepopt.pipeline.same_host_meeting import WHAT, Meeting, Place
from deepopt.pipeline.same_host_memory import Layout, layout_of
from deepopt.pipeline.same_host_socket import WordSocket
from deepopt.pipeline.same_host_state_link import PendingPiece, StateLink
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

logger = logging.getLogger(__name__)

_EXCHANGE = len(Kind)  # the kind of the messages of an exchange: none of a channel's
MOST_RANKS_OF_EXCHANGE = 16  # each sends to all others; gloo needs fewer messages
_NUMBERS = 1 << 32  # message numbers of exchanges begin again


class SameHostTransport:
    """A transport whose messages between workers of one host pass through shared memory.

    On a GPU only copies of layers' states do: they are on the host.

    Args:
        inner: carries the rest.
        device: where tensors live.
        timeout_s: longest wait for a peer, in seconds.
        form_timeout_s: longest meeting, in seconds.
        place: where this worker is; None: as the process finds it.
    """

    def __init__(
        self,
        inner: Transport,
        *,
        device: torch.device,
        timeout_s: float,
        form_timeout_s: float,
        place: Place | None = None,
    ) -> None:
        self._inner = inner
        self._is_on_cpu = device.type == "cpu"
        self._timeout_s = timeout_s
        self._form_timeout_s = form_timeout_s
        self._place = place
        self._links: list[HostLink | None] = [None] * inner.world_size
        self._state_links: list[StateLink | None] = [None] * inner.world_size
        self._backlogs = Backlogs(timeout_s=timeout_s)
        self._num_exchanges = 0
        self._exchanges_here = False
        self._lock = threading.Lock()  # of the next four, and of closing links
        self._generation = 0
        self._ended_generation = 0  # the newest that was interrupted
        self._sockets: list[socket.socket] = []  # of a meeting under way
        self._open: list[HostLink | StateLink] = []

    @property
    def rank(self) -> int:
        """This worker's rank in the world."""
        return self._inner.rank

    @property
    def world_size(self) -> int:
        """Workers in the world."""
        return self._inner.world_size

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Ranks that are reached through shared memory."""
        return tuple(rank for rank, link in enumerate(self._state_links) if link is not None)

    def open(self, channels: Iterable[Channel]) -> None:
        """Open the channels of the transport within; those of one host need nothing."""
        self._inner.open(channels)

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        """Post a receive and return at once."""
        link = self._links[channel.source]
        if link is None or channel.kind is Kind.STATE:
            return self._inner.receive(channel, message, specs)
        return _Receive(link, int(channel.kind), message, layout_of(specs))

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        """Send at once; the tensors may change afterwards, but for those of layers' states."""
        link = self._links[channel.target]
        if link is None or channel.kind is Kind.STATE:
            self._inner.send(channel, message, tensors)
        else:
            link.send(channel.kind, message, tensors, once=channel.kind is Kind.REDUCTION)

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        """As `send`; there is nothing to wait for on one host."""
        link = self._links[channel.target]
        if link is None or channel.kind is Kind.STATE:
            return self._inner.send_awaited(channel, message, tensors)
        self.send(channel, message, tensors)
        return _DONE

    def finish_sends(self) -> None:
        """Block until every posted send is out; give back what peers sent and nobody has any more."""
        self._inner.finish_sends()
        if not self._backlogs.is_empty:
            self._backlogs.wait()
        for link in self._links:
            if link is not None:
                link.free_unused()

    def send_apart(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Send a CPU tensor; done when the receiver has it. From any thread."""
        link = self._state_links[channel.target]
        if link is None:
            return self._inner.send_apart(channel, message, tensor)
        return link.send(message, tensor)

    def receive_into(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Post a receive into a contiguous CPU tensor. From any thread."""
        link = self._state_links[channel.source]
        if link is None:
            return self._inner.receive_into(channel, message, tensor)
        return PendingPiece(link, message, tensor)

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        """Post an exchange of every rank's values and return at once."""
        if not self._exchanges_here:
            return self._inner.start_all_gather(values)
        number = self._num_exchanges % _NUMBERS
        self._num_exchanges += 1
        # The next rank first: all would wake the same one first otherwise.
        for link in (*self._links[self.rank + 1 :], *self._links[: self.rank]):
            if link is not None:
                link.send_values(_EXCHANGE, number, values)
        return _Exchange(self._links, number, values)

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        """Tell whoever asks under this key what the tensors will look like."""
        self._inner.publish(key, specs)

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        """Block until the key was published."""
        return self._inner.look_up(key)

    def join(self, store: Store, *, generation: int) -> None:
        """Form the group of a generation, and connect to its workers on this host.

        Args:
            store: prefixed with the generation.
            generation: which; higher than the one before.

        Raises:
            TransportError: the group did not form in time, or was interrupted.
        """
        self._leave()
        with self._lock:
            self._generation = generation
        meeting = Meeting(
            rank=self.rank,
            world_size=self.world_size,
            num_lines=2 if self._is_on_cpu else 1,
            timeout_s=self._form_timeout_s,
            adopt=self._adopt,
            place=self._place or _place_here(),
        )
        has_formed = False
        try:
            with as_transport_error(WHAT):
                meeting.announce(store)
            self._inner.join(store, generation=generation)
            has_formed = True
            with as_transport_error(WHAT):
                self._use(meeting.connect(store))
        except TransportError:
            for one in self._sockets:
                one.close()
            # Interrupted after the group had formed is no failure: whoever waits for a peer gets an error
            # from the transport within, and a worker takes its layers along into the next generation.
            if not (has_formed and self._ended_generation >= generation):
                raise
        finally:
            meeting.close()
            with self._lock:
                self._sockets.clear()

    def interrupt(self, generation: int) -> None:
        """Make every wait in a generation fail at once, here and at the peers. From any thread.

        Args:
            generation: which; nothing happens to a later one.
        """
        with self._lock:  # first: who then hears of it from the transport within knows why
            self._ended_generation = max(self._ended_generation, generation)
        self._inner.interrupt(generation)
        with self._lock:
            if self._generation > generation:
                return
            for link in self._open:
                link.interrupt()
            for one in self._sockets:
                with suppress(OSError):  # not connected
                    one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections to the peers. For drills."""
        self._inner.cut()
        with self._lock:
            for link in self._open:
                link.cut()

    def close(self) -> None:
        """Leave the peers and the process group."""
        self._leave()
        self._inner.close()

    def _adopt(self, one: socket.socket) -> socket.socket:
        """Let an interrupt end a socket of a meeting."""
        with self._lock:
            if self._ended_generation >= self._generation:
                one.close()
                raise TransportError(f"{WHAT} was interrupted")
            self._sockets.append(one)
        return one

    def _use(self, found: dict[int, list[socket.socket]]) -> None:
        """Send through connections from now on.

        Args:
            found: by rank: that for states, and where tensors are on the CPU that for all else.
        """
        with self._lock:
            if self._ended_generation >= self._generation:
                for one in (one for lines in found.values() for one in lines):
                    one.close()
                return
            for rank, lines in found.items():
                states, *rest = (
                    WordSocket(line, peer=rank, timeout_s=self._timeout_s) for line in lines
                )
                self._state_links[rank] = state_link = StateLink(states)
                self._open.append(state_link)
                for words in rest:
                    self._links[rank] = link = HostLink(words, backlogs=self._backlogs)
                    self._open.append(link)
        if found:
            ranks = ", ".join(map(str, sorted(found)))
            logger.info("ranks reached through shared memory: %s", ranks)
        self._exchanges_here = (
            self._is_on_cpu and len(found) == self.world_size - 1 < MOST_RANKS_OF_EXCHANGE
        )
        self._num_exchanges = 0

    def _leave(self) -> None:
        """Close all connections."""
        with self._lock:
            for link in self._open:
                link.close()
            self._open.clear()
            self._backlogs.clear()
            self._links = [None] * self.world_size
            self._state_links = [None] * self.world_size
        self._exchanges_here = False


class _Receive:
    """A message that is to come; nothing has to be posted for it.

    Args:
        link: that it comes on.
        kind: of it.
        message: its number.
        layout: of its tensors.
    """

    __slots__ = ("_kind", "_layout", "_link", "_message")

    def __init__(self, link: HostLink, kind: int, message: int, layout: Layout) -> None:
        self._link = link
        self._kind = kind
        self._message = message
        self._layout = layout

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Block until all tensors are here."""
        return self._link.receive(self._kind, self._message, self._layout)


class _Done:
    """What is over when it is posted."""

    def wait(self) -> None:
        """Return at once."""


_DONE = _Done()


class _Exchange:
    """An exchange under way.

    Args:
        links: to all others, by rank.
        number: of the exchange.
        own: values of this rank.
    """

    def __init__(
        self, links: Sequence[HostLink | None], number: int, own: Sequence[float]
    ) -> None:
        self._links = links
        self._number = number
        self._own = own

    def wait(self) -> list[list[float]]:
        """Every rank's values by rank, as exact fp64."""
        return [
            [float(value) for value in self._own]
            if link is None
            else link.receive_values(_EXCHANGE, self._number)
            for link in self._links
        ]


def _place_here() -> Place | None:
    """Where this process is; None where that cannot be told: nothing is shared then."""
    try:
        return Place.here()
    except OSError:
        return None
