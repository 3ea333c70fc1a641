"""How workers of one host find each other: they compare in the group's store where they are, and connect.

Two workers use shared memory only if both have said so: each tries to reach the others whose host looks
the same, and tells whom it reached. Names and tokens of the sockets go through the store as well, so that
no other process is taken for a peer; the kernel says whose the process at the other end is.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_memory import new_slot
from deepopt.pipeline.same_host_socket import limit_waits
from deepopt.pipeline.transport import Store

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")
_HELLO = struct.Struct("<16sII")  # token of who is called; rank and line of who calls
_CREDENTIALS = struct.Struct("3i")  # process, user, group
WHAT = "meeting the workers of this host"

Adopt = Callable[[socket.socket], socket.socket]
"""Takes note of a socket, so that an interrupt ends it, and gives it back; raises after one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is, as far as shared memory asks.

    Args:
        host: start of the kernel.
        network: number of the network namespace: names of sockets count in one.
        user: who the process belongs to.
    """

    host: str
    network: int
    user: int

    @classmethod
    def here(cls) -> Place:
        """Of this process.

        Raises:
            OSError: /proc is not as it is on Linux.
        """
        return cls(_BOOT_ID.read_text().strip(), _NETWORK.stat().st_ino, os.geteuid())


class Meeting:
    """One worker's part of a meeting.

    Args:
        rank: this worker's.
        world_size: workers of the group.
        num_lines: connections to each peer.
        timeout_s: longest wait for a peer.
        adopt: of the sockets made here.
        place: where this worker is; None where that cannot be told, or nothing may be shared.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        num_lines: int,
        timeout_s: float,
        adopt: Adopt,
        place: Place | None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._num_lines = num_lines
        self._timeout_s = timeout_s
        self._adopt = adopt
        self._place = place
        self._token = secrets.token_bytes(16)
        self._listener: socket.socket | None = None

    def announce(self, store: Store) -> None:
        """Say where this worker is; before all have met.

        Args:
            store: of the generation.

        Raises:
            RuntimeError: the store is gone.
            TransportError: the generation was interrupted.
        """
        name = ""
        if self._place is not None:
            name = f"deepopt-{secrets.token_hex(8)}"
            listener = self._adopt(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                _, descriptor = new_slot(0, number=0)  # some sandboxes refuse such memory
                os.close(descriptor)
                listener.bind(f"\0{name}")  # no file: gone with the process
                listener.listen(self._num_lines * self._world_size)
                self._listener = listener
            except OSError as error:
                logger.warning("no memory is shared with workers of this host: %s", error)
                listener.close()
                name = ""
        place = asdict(self._place) if self._place is not None else None
        told = {"place": place, "name": name, "token": self._token.hex()}
        store.set(f"same-host/{self._rank}", json.dumps(told))

    def connect(self, store: Store) -> dict[int, list[socket.socket]]:
        """Connect to the workers of this host, who have all announced themselves.

        Args:
            store: of the generation.

        Returns:
            Connections by rank; empty where this worker shares a host with nobody.

        Raises:
            RuntimeError: the store is gone.
            TransportError: a peer that was reached does not answer, or the generation was interrupted.
        """
        told = [json.loads(text) for text in self._gather(store, "same-host")]
        near = [
            rank
            for rank, other in enumerate(told)
            if self._listener is not None
            and rank != self._rank
            and other["name"]
            and other["place"] == told[self._rank]["place"]
        ]
        found: dict[int, list[socket.socket]] = {}
        for rank in (rank for rank in near if rank > self._rank):
            try:
                found[rank] = self._call(told[rank])
            except OSError as error:
                logger.warning("rank %d of this host goes by other sockets: %s", rank, error)
        store.set(f"same-host-reached/{self._rank}", json.dumps(sorted(found)))
        reached = [json.loads(text) for text in self._gather(store, "same-host-reached")]
        callers = [rank for rank in near if rank < self._rank and self._rank in reached[rank]]
        found |= self._answer(callers)
        return found

    def close(self) -> None:
        """Accept nobody any more."""
        if self._listener is not None:
            self._listener.close()

    def _gather(self, store: Any, what: str) -> list[bytes]:
        found: list[bytes] = store.multi_get([f"{what}/{r}" for r in range(self._world_size)])
        return found

    def _call(self, other: dict[str, Any]) -> list[socket.socket]:
        """Connections to a worker, which need not be accepted yet; OSError where it cannot be reached."""
        lines = []
        try:
            for number in range(self._num_lines):
                line = self._adopt(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                lines.append(line)
                limit_waits(line, self._timeout_s)
                line.connect(f"\0{other['name']}")
                if not _is_of_same_user(line):
                    raise PermissionError("another user's process")
                line.sendall(_HELLO.pack(bytes.fromhex(other["token"]), self._rank, number))
        except OSError:
            for line in lines:
                line.close()
            raise
        return lines

    def _answer(self, callers: Sequence[int]) -> dict[int, list[socket.socket]]:
        """Accept the connections of those who have called."""
        found: dict[int, list[socket.socket | None]] = {
            rank: [None] * self._num_lines for rank in callers
        }
        missing = len(callers) * self._num_lines
        deadline_s = time.monotonic() + self._timeout_s
        while missing:
            line = self._accept(deadline_s)
            hello = _read_hello(line, self._timeout_s) if _is_of_same_user(line) else None
            if hello is None or hello[0] != self._token or hello[1] not in found:
                line.close()  # nobody of this group
                continue
            _, rank, number = hello
            found[rank][number] = line
            missing -= 1
        return {rank: [line for line in lines if line] for rank, lines in found.items()}

    def _accept(self, deadline_s: float) -> socket.socket:
        assert self._listener is not None, "a caller found a name that nobody listens to"
        try:
            limit_waits(self._listener, max(0.0, deadline_s - time.monotonic()))
            line, _ = self._listener.accept()
        except BlockingIOError:
            raise TransportError(
                f"{WHAT} failed: a peer did not call within {self._timeout_s:g} s"
            ) from None
        except OSError as error:  # an interrupt shut it down
            raise TransportError(f"{WHAT} was interrupted") from error
        return self._adopt(line)


def _is_of_same_user(line: socket.socket) -> bool:
    size = _CREDENTIALS.size
    credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return bool(_CREDENTIALS.unpack(credentials)[1] == os.geteuid())


def _read_hello(line: socket.socket, timeout_s: float) -> tuple[bytes, int, int] | None:
    limit_waits(line, timeout_s)
    data = b""
    with suppress(OSError):
        data = line.recv(_HELLO.size, socket.MSG_WAITALL)
    return _HELLO.unpack(data) if len(data) == _HELLO.size else None
