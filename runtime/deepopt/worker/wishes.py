"""What somebody asked of a worker, until all workers act on it together.

A wish waits for the exchange at the end of a step, which carries it to all workers. One that an
exchange carried and nobody acted on, because the step was forgotten, waits again.
"""

from __future__ import annotations

import threading

from deepopt.pipeline.step_result import Wish


class Wishes:
    """The wishes of one worker. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = Wish.NONE
        self._carried = Wish.NONE  # by the exchange of the step in work

    @property
    def waiting(self) -> Wish:
        """Those that no exchange carries yet."""
        return self._waiting

    def add(self, wish: Wish) -> None:
        """Ask for something after the step in work."""
        with self._lock:
            self._waiting |= wish

    def take(self) -> Wish:
        """All that wait, for an exchange to carry."""
        with self._lock:
            self._carried, self._waiting = self._waiting, Wish.NONE
            return self._carried

    def settle(self) -> None:
        """The exchange has been held: all workers know what it carried."""
        with self._lock:
            self._carried = Wish.NONE

    def put_back(self) -> None:
        """The step was forgotten: nobody acted on what its exchange carried."""
        with self._lock:
            self._waiting |= self._carried
            self._carried = Wish.NONE
