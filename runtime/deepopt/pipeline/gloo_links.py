"""The connections of this process's gloo group, so that another thread can end all waits on them.

Nothing in torch 2.13 unblocks a gloo operation from another thread; `shutdown(2)` on gloo's own
sockets does. They are found exactly, because others (Ray's) must stay untouched: an accepted one
has the group's listening port here, one that was opened has a peer's listening address there. The
store's connections are ended as well: a group that forms waits for keys. One that has all keys waits
for peers to connect, and a dead one never does: connections are made in their place, and ended. Linux
only: reads /proc.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

Address = tuple[str, int]
"""IP address and port."""

_DESCRIPTORS = "/proc/self/fd"
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_PAIR_NUMBER = struct.Struct(
    "<q"
)  # what gloo's connecting side says first: which pair it is for
_CONNECT_TIMEOUT_S = 0.5  # to a port of this very process


class GlooLinks:
    """The connections of one group at a time."""

    def __init__(self) -> None:
        self._own: frozenset[Address] = frozenset()  # where the group accepts connections
        self._others: frozenset[Address] = frozenset()  # where they lead to
        self._forming: tuple[frozenset[Address], int] | None = None  # listening before, pairs

    @contextmanager
    def watch(self, store: Any, *, rank: int, world_size: int) -> Iterator[None]:
        """Around the forming of a group: learn its addresses.

        Args:
            store: of the group, prefixed with its generation.
            rank: this worker's.
            world_size: workers of the group.
        """
        server = getattr(store, "underlying_store", store)
        home = frozenset([(server.host, server.port)] if hasattr(server, "port") else [])
        self._own, self._others = frozenset(), home
        before = _listening()
        self._forming = before, world_size
        try:
            yield
        finally:
            self._forming = None
        self._own = _listening() - before
        store.set(f"links/{rank}", json.dumps(sorted(self._own)))
        told = store.multi_get([f"links/{other}" for other in range(world_size)])
        peers = frozenset((host, port) for text in told for host, port in json.loads(text))
        self._others = home | peers

    def cut(self) -> int:
        """End all connections; whoever waits on one, here or at its other end, gets an error.

        Returns:
            How many were ended.
        """
        ports = {port for _, port in self._own}
        count = 0
        for connection in _sockets():
            try:
                if _accepts(connection):
                    continue
                here, there = connection.getsockname(), connection.getpeername()
                if here[1] in ports or _address(there) in self._others:
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
            except OSError:  # not connected, or gone meanwhile
                continue
        if (forming := self._forming) is not None:
            before, num_pairs = forming
            for address in _listening() - before:
                _answer_for_the_dead(address, num_pairs=num_pairs)
        return count


def _answer_for_the_dead(address: Address, *, num_pairs: int) -> None:
    """Connect to a group that forms in the place of all its peers, and close: its wait for them ends
    with an error. A pair that has its peer already takes no notice."""
    for number in range(num_pairs):
        with (
            suppress(OSError),  # it does not listen any more: nothing waits there
            socket.create_connection(address, timeout=_CONNECT_TIMEOUT_S) as connection,
        ):
            connection.sendall(_PAIR_NUMBER.pack(number))


def _listening() -> frozenset[Address]:
    """Where this process accepts TCP connections now."""
    return frozenset(_address(s.getsockname()) for s in _sockets() if _accepts(s))


def _sockets() -> Iterator[socket.socket]:
    """A duplicate of each TCP socket of this process, open while it is looked at."""
    for entry in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - names are all that is needed
        try:
            if not os.readlink(f"{_DESCRIPTORS}/{entry}").startswith("socket:"):  # noqa: PTH115
                continue
            found = socket.socket(fileno=os.dup(int(entry)))
        except OSError:  # closed meanwhile
            continue
        with found:
            if found.family in _FAMILIES and found.type == socket.SOCK_STREAM:
                yield found


def _accepts(found: socket.socket) -> bool:
    try:
        return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def _address(name: Any) -> Address:
    """Without what IPv6 adds to an IPv4 address."""
    return str(name[0]).removeprefix("::ffff:"), int(name[1])
