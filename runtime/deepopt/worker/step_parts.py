"""What a worker's steps were made of, in CPU time: for the comparison with what was predicted.

CPU time of the training thread by part, of all threads of the process, and of everything else that ran
on the host meanwhile. Only sums and medians; nothing is decided here.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from deepopt.pipeline.spans import Span
from deepopt.schedule.ir import COMPUTE_OPS, RECEIVE_OPS, SEND_OPS

_STAT = Path("/proc/stat")
_TICK_S = 0.01  # USER_HZ of Linux is 100 on all platforms it runs on
_IDLE = frozenset({3, 4})  # idle and iowait, by position in the line of all CPUs
_KEPT = 1000  # steps, the newest


class StepParts:
    """Collects the parts of steps."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._before = _clocks()
        self._host_before: float | None = None
        self._process_before = 0.0
        self._num_steps = 0

    def skip(self) -> None:
        """Leave out what was until now."""
        self._before = _clocks()

    def add(self, spans: Sequence[Span], *, parts_s: Mapping[str, float]) -> None:
        """Take one step.

        Args:
            spans: of its actions.
            parts_s: of its end, by name.
        """
        now = _clocks()
        thread_s, process_s = now[0] - self._before[0], now[1] - self._before[1]
        self._before = now
        if self._host_before is None:
            self._host_before, self._process_before = host_busy_s(), now[1]
        else:
            self._num_steps += 1
        found = {
            "compute_cpu_s": sum(s.busy_ns for s in spans if s.action.op in COMPUTE_OPS) * 1e-9,
            "send_cpu_s": sum(s.busy_ns for s in spans if s.action.op in SEND_OPS) * 1e-9,
            "receive_cpu_s": sum(s.busy_ns for s in spans if s.action.op in RECEIVE_OPS) * 1e-9,
            "thread_cpu_s": thread_s,
            "process_cpu_s": process_s,
            **parts_s,
        }
        for name, seconds in found.items():
            self._seconds[name].append(seconds)

    def medians(self) -> dict[str, float]:
        """Seconds of a step by part, and the mean of what the whole host was busy."""
        found = {name: median(times) for name, times in self._seconds.items()}
        if self._num_steps and self._host_before is not None:
            host_s = host_busy_s()
            if host_s is not None:
                found["host_cpu_s"] = (host_s - self._host_before) / self._num_steps
            own = _clocks()[1] - self._process_before
            found["own_cpu_s"] = own / self._num_steps
        return found


def host_busy_s() -> float | None:
    """CPU time that all processes of this host have used; None where nobody counts it."""
    try:
        words = _STAT.read_text(encoding="ascii").partition("\n")[0].split()[1:9]
    except OSError:
        return None
    return sum(int(word) for i, word in enumerate(words) if i not in _IDLE) * _TICK_S


def _clocks() -> tuple[float, float]:
    return time.thread_time(), time.process_time()
