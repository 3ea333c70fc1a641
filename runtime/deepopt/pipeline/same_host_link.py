"""Tensors between two workers of one host, through shared memory.

A send copies its tensors into a free slot and says so in one word: it waits for nobody, and the tensors
may change at once. A receive waits for the word and hands out the tensors where they lie. Words
for other messages than the one that is waited for are kept until they are asked for.
"""

from __future__ import annotations

import array
import os
import select
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_memory import (
    ALIGNMENT_BYTES,
    IncomingSlots,
    Layout,
    OutgoingSlots,
    Slot,
    layout_of,
    new_slot,
    size_of,
    tensors_in,
)
from deepopt.pipeline.same_host_memory import mapped as mapped_memory
from deepopt.pipeline.same_host_socket import Word, WordSocket

_KEPT = 0  # a message in a slot that is used again
_ONCE = 1  # a message in memory of its own
_NO_SLOT = 0
_LARGE_BYTES = 256 << 10  # to make new memory for one takes longer than to copy it
_FLOAT_BYTES = 8

Key = tuple[int, int]
"""Kind and number of a message."""


class _Arrived(NamedTuple):
    """A message that has come.

    Args:
        word: about it.
        memory: its own; None where it lies in a slot.
    """

    word: Word
    memory: memoryview | None


class HostLink:
    """The way to one peer for all that the training thread sends and receives; for one thread.

    Args:
        words: to the peer.
        backlogs: of all links of this thread.
    """

    def __init__(self, words: WordSocket, *, backlogs: Backlogs) -> None:
        self._words = words
        self._backlogs = backlogs
        self._outgoing = OutgoingSlots()
        self._incoming = IncomingSlots()
        self._arrived: dict[Key, deque[_Arrived]] = {}
        self._backlog: deque[tuple[Word, int | None]] = deque()
        backlogs.add(self)

    @property
    def peer(self) -> int:
        """The rank at the other end."""
        return self._words.peer

    @property
    def has_backlog(self) -> bool:
        """Whether the connection did not take all words yet."""
        return bool(self._backlog)

    def fileno(self) -> int:
        """Of the socket, for `poll`."""
        return self._words.fileno()

    def send(
        self, kind: int, message: int, tensors: Sequence[torch.Tensor], *, once: bool = False
    ) -> None:
        """Copy tensors to where the peer finds them.

        Args:
            kind: of the message.
            message: its number.
            tensors: of the CPU.
            once: if the message is large, give its memory back afterwards: it is rare.

        Raises:
            TransportError: the peer is gone, or there is no memory.
        """
        layout = layout_of(tensors)
        size = size_of(layout)
        descriptor: int | None
        if once and size >= _LARGE_BYTES:
            slot, descriptor = self._new_slot(size)
            views = tensors_in(slot.memory, layout)
            word = Word(_ONCE, kind, message, _NO_SLOT, size)
        else:
            slot, descriptor = self._take_slot(size)
            views = slot.views(layout).tensors
            word = Word(_KEPT, kind, message, slot.number, size)
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor.detach())
        self._say(word, descriptor)

    def send_values(self, kind: int, message: int, values: Sequence[float]) -> None:
        """Send numbers as fp64.

        Args:
            kind: of the message.
            message: its number.
            values: to be sent.

        Raises:
            TransportError: the peer is gone, or there is no memory.
        """
        packed = array.array("d", values).tobytes()
        slot, descriptor = self._take_slot(len(packed))
        slot.memory[ALIGNMENT_BYTES : ALIGNMENT_BYTES + len(packed)] = packed
        self._say(Word(_KEPT, kind, message, slot.number, len(packed)), descriptor)

    def receive(self, kind: int, message: int, layout: Layout) -> tuple[torch.Tensor, ...]:
        """Wait for a message; its tensors keep its memory until nobody refers to them.

        Args:
            kind: of the message.
            message: its number.
            layout: of its tensors.

        Raises:
            TransportError: the peer is gone, silent for too long, or sent something else.
        """
        self._incoming.free_unused()
        word, memory = self._await(kind, message)
        if word.size_bytes != size_of(layout):
            raise TransportError(
                f"receive from rank {self.peer} failed: a message takes {word.size_bytes} bytes, "
                f"and its tensors {size_of(layout)}"
            )
        if memory is None:
            return self._incoming.hand_out(word.slot, layout)
        return tensors_in(memory, layout)

    def receive_values(self, kind: int, message: int) -> list[float]:
        """Wait for numbers.

        Args:
            kind: of the message.
            message: its number.

        Raises:
            TransportError: the peer is gone, or silent for too long.
        """
        word, _ = self._await(kind, message)
        slot = self._incoming[word.slot]
        values = array.array("d")
        values.frombytes(slot.memory[ALIGNMENT_BYTES : ALIGNMENT_BYTES + word.size_bytes])
        slot.free()
        return values.tolist()

    def free_unused(self) -> None:
        """Give the peer back what it sent and nobody refers to any more."""
        self._incoming.free_unused()

    def send_backlog(self) -> None:
        """Send what the connection did not take, as far as it does now.

        Raises:
            TransportError: the peer is gone.
        """
        while self._backlog:
            if not self._words.say(*self._backlog[0], wait=False):
                return
            self._backlog.popleft()

    def read(self) -> None:
        """Wait for words, and keep what they say.

        Raises:
            TransportError: the peer is gone, or silent for too long.
        """
        for word, descriptor in self._words.listen():
            memory = None
            if descriptor is not None:
                try:
                    if word.what == _ONCE:
                        memory = mapped_memory(descriptor)
                    else:
                        self._incoming.add(word.slot, descriptor)
                except OSError as error:
                    raise self._no_memory("receive from", error) from error
                finally:
                    os.close(descriptor)
            key = word.kind, word.message
            self._arrived.setdefault(key, deque()).append(_Arrived(word, memory))

    def interrupt(self) -> None:
        """End all waits, here and at the peer, now and later. From any thread."""
        self._words.interrupt()

    def cut(self) -> None:
        """Break the connection, as its failure would."""
        self._words.cut()

    def close(self) -> None:
        """Leave the peer. What it sent stays for as long as somebody refers to it."""
        self._words.cut()
        self._words.close()
        for _, descriptor in self._backlog:
            if descriptor is not None:
                os.close(descriptor)
        self._backlog.clear()

    def _await(self, kind: int, message: int) -> _Arrived:
        key = kind, message
        while (waiting := self._arrived.get(key)) is None:
            if self._backlogs.is_empty:
                self.read()
            else:
                self._backlogs.wait(until_readable=self)
        arrived = waiting.popleft()
        if not waiting:
            del self._arrived[key]
        return arrived

    def _say(self, word: Word, descriptor: int | None) -> None:
        if not self._backlog and self._words.say(word, descriptor, wait=False):
            return
        self._backlog.append((word, descriptor))
        self._backlogs.is_empty = False

    def _take_slot(self, size_bytes: int) -> tuple[Slot, int | None]:
        try:
            return self._outgoing.take(size_bytes)
        except OSError as error:
            raise self._no_memory("send to", error) from error

    def _new_slot(self, size_bytes: int) -> tuple[Slot, int]:
        try:
            return new_slot(size_bytes, number=_NO_SLOT)
        except OSError as error:
            raise self._no_memory("send to", error) from error

    def _no_memory(self, what: str, error: OSError) -> TransportError:
        return TransportError(f"{what} rank {self.peer} failed: no shared memory: {error}")


class Backlogs:
    """The links of one thread, of which some may have words that their connections do not take yet: the
    peers listen to others now. Who waits then must not wait for one peer alone.

    Args:
        timeout_s: longest wait.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._links: list[HostLink] = []
        self.is_empty = True

    def add(self, link: HostLink) -> None:
        """A link of this thread."""
        self._links.append(link)

    def clear(self) -> None:
        """Forget all links."""
        self._links.clear()
        self.is_empty = True

    def wait(self, *, until_readable: HostLink | None = None) -> None:
        """Send what the links have to send, and keep what comes meanwhile.

        Args:
            until_readable: end when words have come from this one; None: when all is sent.

        Raises:
            TransportError: a peer is gone, or nothing moves for too long.
        """
        deadline_s = time.monotonic() + self._timeout_s
        while not self.is_empty:
            poll = select.poll()
            by_number = {link.fileno(): link for link in self._links}
            for number, link in by_number.items():
                poll.register(number, select.POLLIN | (select.POLLOUT * link.has_backlog))
            left_s = max(0.0, deadline_s - time.monotonic())
            ready = [(by_number[number], events) for number, events in poll.poll(1e3 * left_s)]
            if not ready:
                late = _ranks(link.peer for link in self._links if link.has_backlog)
                raise TransportError(
                    f"send to {late} failed: Timed out after {self._timeout_s:g} s"
                )
            for link, events in ready:
                if events & select.POLLOUT:
                    link.send_backlog()
                if events & ~select.POLLOUT:
                    link.read()
            self.is_empty = not any(link.has_backlog for link in self._links)
            if any(link is until_readable and e & ~select.POLLOUT for link, e in ready):
                return


def _ranks(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    return ("rank " if len(found) == 1 else "ranks ") + ", ".join(map(str, found))
