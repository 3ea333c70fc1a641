"""Waits for posted sends that another thread can end.

Gloo may lose a send whose connection breaks at the moment in which the receiver asks for it (torch
2.13): its buffer hears neither of success nor of the error, and whoever waits, waits for the whole
timeout, whatever becomes of the connection. So the wait itself runs on a thread that may be left behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

from deepopt.errors import TransportError


class Work(Protocol):
    """A posted send; its wait ends by itself after `pipeline.timeout_s` at the latest."""

    def wait(self) -> object:
        """Block until it is out."""
        ...


class SendWaits:
    """The waits of one transport. All methods from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of the next three
        self._open: set[threading.Event] = set()
        self._idle: list[_Waiter] = []  # starting a thread takes longer than most waits
        self._is_ended = False

    def begin(self) -> None:
        """Waits may be long again: a new group forms."""
        with self._lock:
            self._is_ended = False

    def end(self) -> None:
        """End all waits, and all that come before the next `begin`."""
        with self._lock:
            self._is_ended = True
            for over in self._open:
                over.set()

    def close(self) -> None:
        """End the threads that nobody waits for."""
        with self._lock:
            idle, self._idle = self._idle, []
        for waiter in idle:
            waiter.dismiss()

    def wait(self, works: Sequence[Work], what: str) -> None:
        """Block until all are out.

        Args:
            works: posted sends.
            what: is waited for, in an error.

        Raises:
            TransportError: `end` was called.
            RuntimeError: what the backend says of a send that failed.
        """
        if not works:
            return
        over = threading.Event()
        results: list[Exception | None] = []
        with self._lock:
            if self._is_ended:
                raise TransportError(f"{what} was interrupted")
            self._open.add(over)
            waiter = self._idle.pop() if self._idle else None
        waiter = waiter or _Waiter()
        waiter.ask(works, results, over)
        over.wait()
        with self._lock:
            self._open.discard(over)
            if results:
                self._idle.append(waiter)
        if not results:
            waiter.dismiss()  # it is left behind, and ends when the backend lets it go
            raise TransportError(f"{what} was interrupted")
        if results[0] is not None:
            raise results[0]


_Request = tuple[Sequence[Work], list[Exception | None], threading.Event]


class _Waiter:
    """A thread that waits for one request after the other."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="send-wait", daemon=True).start()

    def ask(
        self, works: Sequence[Work], results: list[Exception | None], over: threading.Event
    ) -> None:
        """Wait for sends; then `results` has one entry, and `over` is set."""
        self._requests.put((works, results, over))

    def dismiss(self) -> None:
        """End when what was asked for is over."""
        self._requests.put(None)

    def _serve(self) -> None:
        while (request := self._requests.get()) is not None:
            works, results, over = request
            try:
                for work in works:
                    work.wait()
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                results.append(error)
            else:
                results.append(None)
            over.set()
            del request, works, results  # a send keeps its tensor
