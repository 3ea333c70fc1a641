"""Clocks as arguments: intervals from a monotonic clock, dates for people only."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where a decision takes its time from; tests pass a fake one."""

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back; only differences mean something."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def monotonic_s(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()


def utc_now() -> str:
    """The date and time for people and files: ISO 8601, UTC, milliseconds."""
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds")
