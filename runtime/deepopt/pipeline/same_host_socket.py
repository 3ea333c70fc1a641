"""The words that two workers of one host exchange about their shared memory, over a Unix socket.

A word is a record of fixed size: which message lies in which slot. A new slot's descriptor travels with
the first word about it. The kernel closes a dead process's sockets, so its peers hear of it at once.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from deepopt.errors import TransportError

_RECORD = struct.Struct("<IIIIQ")
_READ_BYTES = 128 * _RECORD.size
_DESCRIPTOR_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(_DESCRIPTOR_BYTES)
_TIMEVAL = struct.Struct("@ll")
# Plain numbers: arithmetic with the enumeration's takes a microsecond.
_DO_NOT_WAIT = int(socket.MSG_DONTWAIT)
_IS_CUT_SHORT = int(socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
CLOSED = "Connection closed by peer"


def limit_waits(connection: socket.socket, timeout_s: float) -> None:
    """Let calls on a socket end after a while, with BlockingIOError. The kernel's own timeout: Python's asks
    `poll` before every call, and then no shutdown ends an `accept`.

    Args:
        connection: any socket.
        timeout_s: longest wait.
    """
    connection.settimeout(None)
    seconds, rest = divmod(timeout_s, 1.0)
    limit = _TIMEVAL.pack(int(seconds), max(1, int(rest * 1e6)))  # all zero: for ever
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class Word(NamedTuple):
    """What is said of a slot.

    Args:
        what: see `same_host_link`.
        kind: of the message.
        message: its number.
        slot: number of the slot.
        size_bytes: of the message in it.
    """

    what: int
    kind: int
    message: int
    slot: int
    size_bytes: int


class WordSocket:
    """One end of a connection. Any number of threads may say something, one at a time listens.

    Args:
        connection: is this object's from now on; Unix, of streams.
        peer: rank at the other end.
        timeout_s: longest wait.
    """

    def __init__(self, connection: socket.socket, *, peer: int, timeout_s: float) -> None:
        self.peer = peer
        self._socket = connection
        self._timeout_s = timeout_s
        self._is_interrupted = False
        limit_waits(connection, timeout_s)

    def fileno(self) -> int:
        """Of the socket, for `poll`."""
        return self._socket.fileno()

    def say(self, word: Word, descriptor: int | None = None, *, wait: bool) -> bool:
        """Send a word; a descriptor that comes with it is closed.

        Args:
            word: to be sent.
            descriptor: of a new slot.
            wait: whether to wait while the connection takes no more.

        Returns:
            Whether it was sent; if not, the descriptor is open.

        Raises:
            TransportError: the peer is gone.
        """
        record, flags = _RECORD.pack(*word), 0 if wait else _DO_NOT_WAIT
        try:
            # All or nothing: the kernel takes so few bytes in one piece.
            if descriptor is None:
                self._socket.send(record, flags)
            else:
                rights = array.array("i", [descriptor])
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                self._socket.sendmsg([record], ancillary, flags)
        except BlockingIOError:
            if not wait:
                return False
            raise TransportError(
                f"send to rank {self.peer} failed: Timed out after {self._timeout_s:g} s"
            ) from None
        except OSError as error:
            raise self._broken(f"send to rank {self.peer}", error) from error
        if descriptor is not None:
            os.close(descriptor)
        return True

    def listen(self) -> Iterator[tuple[Word, int | None]]:
        """Block until words have come: each, with the descriptor that came with it, which is the caller's.

        Raises:
            TransportError: the peer is gone, or says nothing in time.
        """
        what = f"receive from rank {self.peer}"
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _READ_BYTES, _ANCILLARY_BYTES, _CLOSE_ON_EXEC
            )
        except BlockingIOError:
            raise TransportError(
                f"{what} failed: Timed out after {self._timeout_s:g} s"
            ) from None
        except OSError as error:
            raise self._broken(what, error) from error
        if not data:
            raise self._broken(what, CLOSED)
        if flags & _IS_CUT_SHORT:
            raise self._broken(what, "no descriptor is left in this process")
        descriptor = None
        for *_, packed in ancillary:
            descriptor = array.array("i", packed[:_DESCRIPTOR_BYTES])[0]
        # Reads are multiples of a word, as sends are, and the kernel ends a read behind a descriptor.
        last = len(data) - _RECORD.size
        for offset in range(0, len(data), _RECORD.size):
            word = Word._make(_RECORD.unpack_from(data, offset))
            yield word, descriptor if offset == last else None

    def interrupt(self) -> None:
        """End all waits, here and at the peer, now and later. From any thread."""
        self._is_interrupted = True
        self.cut()

    def cut(self) -> None:
        """Break the connection, as its failure would."""
        with suppress(OSError):  # the peer did so before
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the socket back; no thread may be in here."""
        self._socket.close()

    def _broken(self, what: str, reason: object) -> TransportError:
        if self._is_interrupted:
            return TransportError(f"{what} was interrupted")
        if isinstance(reason, (BrokenPipeError, ConnectionResetError)):
            reason = CLOSED
        return TransportError(f"{what} failed: {reason}")
