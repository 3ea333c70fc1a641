"""Messages from a worker to the head, sent without waiting and with a bound on what is under way."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

MOST_UNDER_WAY = (
    64  # reports of a minute of fast steps; more means that the head does not answer
)
SEND_TIMEOUT_S = 60.0  # for the head to take a message once that many are under way


class Mailbox:
    """Sends messages in the order in which they are given.

    Args:
        send: starts one call of the head and returns its reference.
        wait: waits for references: (references, timeout in seconds) -> those still under way.
    """

    def __init__(
        self,
        send: Callable[[Any], Any],
        *,
        wait: Callable[[list[Any], float], list[Any]],
    ) -> None:
        self._send = send
        self._wait = wait
        self._under_way: deque[Any] = deque()
        self._lock = threading.Lock()

    def post(self, message: Any) -> None:
        """Send a message; waits only while too many are under way."""
        with self._lock:
            if len(self._under_way) >= MOST_UNDER_WAY and self._wait(
                [self._under_way.popleft()], SEND_TIMEOUT_S
            ):
                logger.warning("the head has not answered for %g s", SEND_TIMEOUT_S)
            self._under_way.append(self._send(message))

    def post_if_idle(self, message: Any) -> None:
        """Send a message that later ones replace; left out while the head lags behind."""
        if len(self._under_way) < MOST_UNDER_WAY // 2 or self._prune():
            with self._lock:
                self._under_way.append(self._send(message))

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until the head has taken everything.

        Returns:
            False when the time was over first.
        """
        with self._lock:
            left = self._wait(list(self._under_way), timeout_s)
            self._under_way = deque(left)
            return not left

    def _prune(self) -> bool:
        with self._lock:
            self._under_way = deque(self._wait(list(self._under_way), 0.0))
            return len(self._under_way) < MOST_UNDER_WAY // 2
