"""Layers' states between two workers of one host: pieces of some MB, from any thread.

As on a `HostLink` pieces pass through shared memory; but here a send is done only when its receiver has
taken the piece, so that no more memory is in use than one side is ahead of the other. A piece of shareable
memory is not copied into a slot: its receiver reads it where it lies.
"""

from __future__ import annotations

import os
import threading
from collections import deque

import torch

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_memory import (
    ALIGNMENT_BYTES,
    IncomingSlots,
    OutgoingSlots,
    layout_of,
    mapped,
    size_of,
)
from deepopt.pipeline.same_host_socket import Word, WordSocket
from deepopt.pipeline.shareable_memory import Place, place_of

_PIECE = 0  # lies in a slot
_TAKEN = 1  # out of a slot
_PLACED = 2  # lies where it was before; words say `slot` for the memory, and `kind` for its line there
_READ = 3  # from there

Key = tuple[int, int]
"""What is said, and of which message (a piece, read) or slot (taken)."""


class StateLink:
    """The way to one peer for pieces of layers' states. All methods from any thread.

    Args:
        words: to the peer.
    """

    def __init__(self, words: WordSocket) -> None:
        self._words = words
        self._outgoing = OutgoingSlots()
        self._incoming = IncomingSlots()
        self._shown: set[int] = set()  # memories that the peer knows
        self._seen: dict[int, memoryview] = {}  # those of the peer's
        self._changed = threading.Condition()  # of all below and above
        self._arrived: dict[Key, deque[Word]] = {}
        self._error: TransportError | None = None
        self._has_listener = False
        self._is_closed = False

    def send(self, message: int, tensor: torch.Tensor) -> PendingSend:
        """Put a piece where the peer finds it; what is returned waits until it was taken. It must not change
        before.

        Args:
            message: its number.
            tensor: of the CPU.

        Raises:
            TransportError: the peer is gone, or there is no memory.
        """
        layout = layout_of((tensor,))
        size = size_of(layout)
        place = place_of(tensor) if tensor.is_contiguous() else None
        if place is not None and not place.offset % ALIGNMENT_BYTES:
            return self._show(message, place, size)
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
        return PendingSend(self, (_TAKEN, slot.number))

    def _show(self, message: int, place: Place, size_bytes: int) -> PendingSend:
        """Tell the peer where a piece lies."""
        word = Word(_PLACED, place.offset // ALIGNMENT_BYTES, message, place.number, size_bytes)
        with self._changed:
            self._check_open()
            descriptor = None
            if place.number not in self._shown:
                descriptor = os.dup(place.descriptor)
                self._shown.add(place.number)
            self._words.say(word, descriptor, wait=True)
        return PendingSend(self, (_READ, message))

    def wait_until_taken(self, key: Key) -> None:
        """Wait until the peer has taken a piece.

        Args:
            key: what it will say.

        Raises:
            TransportError: the peer is gone, or silent for too long.
        """
        self._await(key)

    def receive_into(self, message: int, tensor: torch.Tensor) -> None:
        """Wait for a piece and copy it out of its slot.

        Args:
            message: its number.
            tensor: contiguous, of the CPU; it is overwritten.

        Raises:
            TransportError: the peer is gone, silent for too long, or sent something else.
        """
        word = self._await((_PIECE, message))
        layout = layout_of((tensor,))
        if word.size_bytes != size_of(layout):
            raise TransportError(
                f"receive from rank {self._words.peer} failed: a piece takes {word.size_bytes} "
                f"bytes, and its tensor {size_of(layout)}"
            )
        if word.what == _PLACED:
            with self._changed:
                memory = self._seen[word.slot]
            first = word.kind * ALIGNMENT_BYTES
            part = memory[first : first + tensor.numel() * tensor.element_size()]
            tensor.detach().view(-1).copy_(torch.frombuffer(part, dtype=tensor.dtype))
            done = Word(_READ, 0, message, 0, 0)
        else:
            with self._changed:
                slot = self._incoming[word.slot]
            tensor.detach().copy_(slot.views(layout).tensors[0])
            slot.free()
            done = Word(_TAKEN, 0, 0, word.slot, 0)
        with self._changed:
            self._check_open()
            self._words.say(done, wait=True)

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

    def _await(self, key: Key) -> Word:
        """Wait for a word. Of several threads that wait, one listens for all."""
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
                    if word.what == _PLACED:
                        self._seen[word.slot] = mapped(descriptor)
                    else:
                        self._incoming.add(word.slot, descriptor)
                except OSError as error:
                    self._error = TransportError(
                        f"receive from rank {self._words.peer} failed: no shared memory: {error}"
                    )
                    return
                finally:
                    os.close(descriptor)
            what = _PIECE if word.what == _PLACED else word.what
            number = word.slot if what == _TAKEN else word.message
            self._arrived.setdefault((what, number), deque()).append(word)


class PendingSend:
    """A piece on its way.

    Args:
        link: that it was sent on.
        key: what the peer says when it has taken it.
    """

    def __init__(self, link: StateLink, key: Key) -> None:
        self._link = link
        self._key = key

    def wait(self) -> None:
        """Block until the peer has taken it."""
        self._link.wait_until_taken(self._key)


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
