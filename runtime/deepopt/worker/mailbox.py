"""Messages from a worker to the head, sent without waiting and with a bound on what is under way.

What a head has not taken before it died is kept and goes to the next one, in the same order.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MOST_UNDER_WAY = (
    64  # reports of a minute of fast steps; more means that the head does not answer
)
MOST_KEPT = 10_000  # for the next head: hours of steps of a second
SEND_TIMEOUT_S = 60.0  # for the head to take a message once that many are under way


@dataclass(frozen=True, slots=True)
class _Sent:
    message: Any
    reference: Any
    is_replaced: bool  # a later message says the same: not worth keeping


class Mailbox:
    """Sends messages in the order in which they are given.

    Args:
        send: starts one call of the head and returns its reference.
        wait: waits for references: (references, timeout in seconds) -> those still under way.
        was_taken: whether a call that is over has succeeded; False when the head has died.
    """

    def __init__(
        self,
        send: Callable[[Any], Any],
        *,
        wait: Callable[[list[Any], float], list[Any]],
        was_taken: Callable[[Any], bool] = lambda _: True,
    ) -> None:
        self._send = send
        self._wait = wait
        self._was_taken = was_taken
        self._under_way: deque[_Sent] = deque()
        self._kept: deque[Any] | None = None  # while there is no head
        self._lock = threading.Lock()

    def post(self, message: Any) -> None:
        """Send a message; waits only while too many are under way."""
        with self._lock:
            if self._kept is None and len(self._under_way) >= MOST_UNDER_WAY:
                if self._wait([self._under_way[0].reference], SEND_TIMEOUT_S):
                    logger.warning("the head has not answered for %g s", SEND_TIMEOUT_S)
                    self._under_way.popleft()
                else:
                    self._settle(self._under_way[0])
            self._give(message, is_replaced=False)

    def post_if_idle(self, message: Any) -> None:
        """Send a message that later ones replace; left out while the head lags behind."""
        self.tidy()
        with self._lock:
            if self._kept is None and len(self._under_way) < MOST_UNDER_WAY // 2:
                self._give(message, is_replaced=True)

    def tidy(self) -> None:
        """Forget what the head has taken, so that no `post` waits to find it out."""
        with self._lock:
            if len(self._under_way) >= MOST_UNDER_WAY // 2:
                self._prune(timeout_s=0.0)

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until the head has taken everything.

        Returns:
            False when the time was over first, or there is no head.
        """
        with self._lock:
            self._prune(timeout_s=timeout_s)
            return self._kept is None and not self._under_way

    def redirect(self, send: Callable[[Any], Any]) -> None:
        """Send to another head from now on, first what the one before may not have taken."""
        with self._lock:
            self._lose_head()
            kept, self._kept = self._kept or (), None
            self._send = send
            for message in kept:
                self._give(message, is_replaced=False)

    def _give(self, message: Any, *, is_replaced: bool) -> None:
        if self._kept is not None:
            self._kept.append(message)
        else:
            self._under_way.append(_Sent(message, self._send(message), is_replaced))

    def _prune(self, *, timeout_s: float) -> None:
        left = self._wait([sent.reference for sent in self._under_way], timeout_s)
        for sent in [sent for sent in self._under_way if sent.reference not in left]:
            if self._kept is None:
                self._settle(sent)

    def _settle(self, sent: _Sent) -> None:
        """A call is over: the message is there, or its head is dead."""
        if self._was_taken(sent.reference):
            self._under_way.remove(sent)
        else:
            self._lose_head()

    def _lose_head(self) -> None:
        if self._kept is None:
            self._kept = deque(maxlen=MOST_KEPT)
        self._kept.extendleft(
            sent.message for sent in reversed(self._under_way) if not sent.is_replaced
        )
        self._under_way.clear()
