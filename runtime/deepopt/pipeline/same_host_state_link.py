"""Layers' states between two workers of one host: pieces of some MB, from any thread.

As on a `HostLink` pieces pass through shared memory; but here a send is done only when its receiver has
taken the piece, so that no more memory is in use than one side is ahead of the other.
"""

from __future__ import annotations

import os
import threading
from collections import deque

import torch

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_memory import (
    IncomingSlots,
    OutgoingSlots,
    layout_of,
    size_of,
)
from deepopt.pipeline.same_host_socket import Word, WordSocket

_PIECE = 0  # lies in a slot
_TAKEN = 1  # out of a slot

Key = tuple[int, int]
"""What is said, and of which message (a piece) or slot (taken)."""


class StateLink:
    """The way to one peer for pieces of layers' states. All methods from any thread.

    Args:
        words: to the peer.
    """

    def __init__(self, words: WordSocket) -> None:
        self._words = words
        self._outgoing = OutgoingSlots()
        self._incoming = IncomingSlots()
        self._changed = threading.Condition()  # of all below and above
        self._arrived: dict[Key, deque[Word]] = {}
        self._error: TransportError | None = None
        self._has_listener = False
        self._is_closed = False

    def send(self, message: int, tensor: torch.Tensor) -> PendingSend:
        """Copy a piece to where the peer finds it; what is returned waits until it was taken.

        Args:
            message: its number.
            tensor: of the CPU.

        Raises:
            TransportError: the peer is gone, or there is no memory.
        """
        layout = layout_of((tensor,))
        size = size_of(layout)
        with self._changed:
            self._check_open()
            try:
                slot, descriptor = self._outgoing.take(size)
            except OSError as error:
                raise TransportError(
                    f"send to rank {self._words.peer} failed: no shared memory: {error}"
                ) from error
            slot.views(layout).tensors[0].copy_(tensor.detach())
            word = Word(_PIECE, 0, message, slot.number, size)
            self._words.say(word, descriptor, wait=True)
        return PendingSend(self, slot.number)

    def wait_until_taken(self, slot: int) -> None:
        """Wait until the peer has taken what was sent in a slot.

        Args:
            slot: its number.

        Raises:
            TransportError: the peer is gone, or silent for too long.
        """
        self._await(_TAKEN, slot)

    def receive_into(self, message: int, tensor: torch.Tensor) -> None:
        """Wait for a piece and copy it out of its slot.

        Args:
            message: its number.
            tensor: contiguous, of the CPU; it is overwritten.

        Raises:
            TransportError: the peer is gone, silent for too long, or sent something else.
        """
        word = self._await(_PIECE, message)
        layout = layout_of((tensor,))
        if word.size_bytes != size_of(layout):
            raise TransportError(
                f"receive from rank {self._words.peer} failed: a piece takes {word.size_bytes} "
                f"bytes, and its tensor {size_of(layout)}"
            )
        with self._changed:
            slot = self._incoming[word.slot]
        tensor.detach().copy_(slot.views(layout).tensors[0])
        slot.free()
        with self._changed:
            self._check_open()
            self._words.say(Word(_TAKEN, 0, 0, word.slot, 0), wait=True)

    def interrupt(self) -> None:
        """End all waits, here and at the peer, now and later."""
        self._words.interrupt()

    def cut(self) -> None:
        """Break the connection, as its failure would."""
        self._words.cut()

    def close(self) -> None:
        """Leave the peer; whoever waits gets an error."""
        self._words.interrupt()
        with self._changed:
            self._is_closed = True
            if not self._has_listener:
                self._words.close()

    def _check_open(self) -> None:
        """Refuse what would use a socket that is not there any more."""
        if self._is_closed:
            raise TransportError(f"the link to rank {self._words.peer} was left")

    def _await(self, what: int, number: int) -> Word:
        """Wait for a word. Of several threads that wait, one listens for all."""
        key = what, number
        with self._changed:
            while True:
                waiting = self._arrived.get(key)
                if waiting is not None:
                    word = waiting.popleft()
                    if not waiting:
                        del self._arrived[key]
                    return word
                if self._error is not None:
                    raise TransportError(self._error.message)
                if self._has_listener:
                    self._changed.wait()
                    continue
                self._check_open()
                self._has_listener = True
                self._changed.release()
                try:
                    heard = self._listen()
                finally:
                    self._changed.acquire()
                    self._has_listener = False
                    self._changed.notify_all()
                    if self._is_closed:
                        self._words.close()
                self._keep(heard)

    def _listen(self) -> list[tuple[Word, int | None]] | TransportError:
        try:
            return list(self._words.listen())
        except TransportError as error:
            return error

    def _keep(self, heard: list[tuple[Word, int | None]] | TransportError) -> None:
        if isinstance(heard, TransportError):
            self._error = heard
            return
        for word, descriptor in heard:
            if descriptor is not None:
                try:
                    self._incoming.add(word.slot, descriptor)
                except OSError as error:
                    self._error = TransportError(
                        f"receive from rank {self._words.peer} failed: no shared memory: {error}"
                    )
                    return
                finally:
                    os.close(descriptor)
            number = word.message if word.what == _PIECE else word.slot
            self._arrived.setdefault((word.what, number), deque()).append(word)


class PendingSend:
    """A piece on its way.

    Args:
        link: that it was sent on.
        slot: that it lies in.
    """

    def __init__(self, link: StateLink, slot: int) -> None:
        self._link = link
        self._slot = slot

    def wait(self) -> None:
        """Block until the peer has taken it."""
        self._link.wait_until_taken(self._slot)


class PendingPiece:
    """A piece that is to come.

    Args:
        link: that it comes on.
        message: its number.
        tensor: that takes it.
    """

    def __init__(self, link: StateLink, message: int, tensor: torch.Tensor) -> None:
        self._link = link
        self._message = message
        self._tensor = tensor

    def wait(self) -> None:
        """Block until it is here."""
        self._link.receive_into(self._message, self._tensor)
