"""Watches the head for its supervisor: one that does not answer is killed, so that it is replaced.

A head at work replaces its status file twice a second: that is answer enough, and costs it nothing more.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

from deepopt.cluster.process_look import look_at
from deepopt.cluster.process_table import find_process

logger = logging.getLogger(__name__)

LOOK_S = 1.0  # between two questions, and from the last sign to the next one
STOPPED_S = 2.0  # without an answer, from a process that a signal has stopped
TIMEOUT_S = 10.0  # ... from any other; answers come from a thread of their own, in milliseconds


class HeadWatch:
    """Asks a head whether it lives.

    Args:
        ask: starts a call that returns the head's process id, and has the answer given to a function.
        now_s: the time.
    """

    def __init__(self, ask: Callable[[Callable[[Any], None]], None], *, now_s: float) -> None:
        self._ask = ask
        self._pid = 0  # before its first answer it may still be starting
        self._heard_s = self._asked_s = now_s
        self._is_asked = False
        self._looked_s = now_s
        self._sign: object = None

    def look(self, *, now_s: float, sign: object = None) -> bool:
        """Ask again when it is time; kill a head that has been silent for too long.

        Args:
            now_s: the time.
            sign: what another value of shows that the head lives; None for nothing.

        Returns:
            Whether it was killed.
        """
        if now_s - self._looked_s > LOOK_S:  # the supervisor itself was not looking
            self._heard_s += now_s - self._looked_s
        self._looked_s = now_s
        if self._pid and sign is not None and sign != self._sign:
            self._heard_s = self._asked_s = now_s
            self._is_asked = False
        self._sign = sign
        if not self._is_asked and now_s - self._asked_s >= LOOK_S:
            self._asked_s, self._is_asked = now_s, True
            self._ask(self._take)
        if not self._is_asked:
            self._heard_s = now_s
        silence_s = now_s - self._heard_s
        if self._pid and silence_s > STOPPED_S:
            look = look_at(self._pid)
            if silence_s <= TIMEOUT_S and not (look is not None and look.is_stopped):
                return False
            logger.warning(
                "the head, pid %d, has been silent for %.1f s; it is %s",
                self._pid,
                silence_s,
                "gone" if look is None else look.words(),
            )
            process = find_process(self._pid)
            self._pid = 0
            return process is not None and process.send(signal.SIGKILL)
        return False

    def _take(self, answer: Any) -> None:
        if isinstance(answer, int):
            self._pid, self._is_asked = answer, False
