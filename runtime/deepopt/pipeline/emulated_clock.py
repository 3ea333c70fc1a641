"""Time on emulated devices: waiting to a moment on the monotonic clock, which all processes of a host
share, and counting who came late.

A sleep alone wakes late, by 60 to 85 us where a virtual machine has to be woken; so it ends a little
early, and a short spin does the rest: one that gives way to others, except at the very end, because who
gave way is 15 to 25 us late in the median.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

_SPIN_NS = 100_000  # before the moment a sleep ends: later than it may be late
_LAST_NS = 50_000  # before the moment nobody is given way to
_PR_SET_TIMERSLACK = 29  # linux/prctl.h
_FINEST_SLACK_NS = 1


@dataclass(slots=True)
class Overruns:
    """Operations whose real work took longer than the table says.

    Args:
        num_operations: forwards, backwards and updates of layers so far.
        num_overran: those of them that ended late.
        late_s: by how much, all together.
    """

    num_operations: int = 0
    num_overran: int = 0
    late_s: float = 0.0

    def since(self, before: Overruns) -> Overruns:
        """What came after an earlier count of the same device."""
        return Overruns(
            num_operations=self.num_operations - before.num_operations,
            num_overran=self.num_overran - before.num_overran,
            late_s=self.late_s - before.late_s,
        )


def sharpen_timer() -> None:
    """Let sleeps of the calling thread end on time: Linux may add 50 us to each to save power."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_TIMERSLACK, _FINEST_SLACK_NS, 0, 0, 0)


def wait_until(moment_ns: int) -> None:
    """Return at a moment, or at once if it is over.

    Args:
        moment_ns: of `time.monotonic_ns`.
    """
    left_ns = moment_ns - time.monotonic_ns()
    if left_ns > _SPIN_NS:
        time.sleep((left_ns - _SPIN_NS) * 1e-9)
    while time.monotonic_ns() < moment_ns - _LAST_NS:
        time.sleep(0)
    while time.monotonic_ns() < moment_ns:
        pass
