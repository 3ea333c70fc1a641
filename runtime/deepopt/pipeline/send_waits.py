"""Waits for posted sends that another thread can end.

Gloo may lose a send whose connection breaks at the moment in which the receiver asks for it (torch
2.13): its buffer hears neither of success nor of the error, and whoever waits, waits for the whole
timeout, whatever becomes of the connection. So the wait itself runs on a thread that may be left behind.
"""

from __future__ import annotations

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
        self._lock = threading.Lock()  # of the next two
        self._open: set[threading.Event] = set()
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
        threading.Thread(
            target=_wait, args=(works, results, over), name="send-wait", daemon=True
        ).start()
        over.wait()
        with self._lock:
            self._open.discard(over)
        if not results:
            raise TransportError(f"{what} was interrupted")
        if results[0] is not None:
            raise results[0]


def _wait(
    works: Sequence[Work], results: list[Exception | None], over: threading.Event
) -> None:
    try:
        for work in works:
            work.wait()
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        results.append(error)
    else:
        results.append(None)
    over.set()
