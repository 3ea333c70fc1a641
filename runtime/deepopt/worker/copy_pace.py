"""How often copies of layers may be made, so that training loses no more than a share of the time. Pure."""

from __future__ import annotations

from collections import deque

# The first copies are made one after the other, to learn what one takes: the first of all asks for its
# memory and opens its connection, any may wait for a core, and they may be all that a fault finds.
FIRST_COPIES = 3
_COPIES_REMEMBERED = 8  # a network that has become slower is noticed within so many


class CopyPace:
    """Says when the next copy may begin.

    What a copy takes of the training is the least time that one of the last ones took: what others took
    longer they waited for a core, or for the tensors of a step. Where training keeps all cores busy, that is
    still what it loses to a copy, and not too much: sockets take CPU time on both sides (measured on 2 cores:
    40 to 60 ms for 12 MB each way, where the link alone takes 12, and training loses 80).

    Args:
        share: of the time, that copies may take.
    """

    def __init__(self, *, share: float) -> None:
        self._share = share
        self._took_s: deque[float] = deque(maxlen=_COPIES_REMEMBERED)
        self._copies = 0
        self._rests_until_s = float("-inf")

    def made(self, *, took_s: float, now_s: float) -> None:
        """Take note of a copy.

        Args:
            took_s: from its beginning to its end.
            now_s: the time.
        """
        self._copies += 1
        self._took_s.append(took_s)
        if self._copies >= FIRST_COPIES:
            self._rests_until_s = now_s + min(self._took_s) * (1 / self._share - 1)

    def rests(self, *, now_s: float) -> bool:
        """Whether the next copy has to wait."""
        return now_s < self._rests_until_s
