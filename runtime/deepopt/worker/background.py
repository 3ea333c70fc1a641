"""What takes cores of this host beside the training while it runs: deepopt's head, Ray, and the workers'
other threads, which beat, report and carry Ray's messages.

They take as much while workers measure their layers as while they train, for their work is that of the
clock: beats, looks at them, Ray's own. Where workers share cores, their steps are longer by it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass

LEAST_S = 1.0  # of a look: some of that work is done once in a second
_SCHEDULED = 2  # clock_getcpuclockid(3) of a process: ~pid << 3, and which of its clocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """Cores that something takes, on average.

    Args:
        processes: those of this worker's session but for the workers: the head, Ray, their helpers.
        threads: threads of this worker but for the one that trains.
    """

    processes: float
    threads: float


class BackgroundTrial:
    """Looks at the CPU time of the job's processes on this host, from `begin` to `end`.

    Args:
        workers: process ids of the job's workers on this host; a job's processes are one session there.
    """

    def __init__(self, workers: Collection[int]) -> None:
        self._workers = frozenset(workers)
        self._began = 0.0
        self._processes: dict[int, float] = {}
        self._own = 0.0

    def begin(self) -> None:
        """Look for the first time. In the thread that trains."""
        self._processes, self._own = self._look()
        self._began = time.perf_counter()

    def left_s(self) -> float:
        """How long to wait until what was seen says something."""
        return max(0.0, LEAST_S - (time.perf_counter() - self._began))

    def end(self) -> Background:
        """Look again. In the same thread.

        Processes that began or ended in between do not count: those of the background stay.
        """
        processes, own = self._look()
        seconds = time.perf_counter() - self._began
        both = processes.keys() & self._processes.keys()
        used = sum(processes[pid] - self._processes[pid] for pid in both)
        return Background(processes=used / seconds, threads=max(0.0, own - self._own) / seconds)

    def _look(self) -> tuple[dict[int, float], float]:
        """CPU seconds of each process of the background, and of this one's other threads."""
        found = {}
        for pid in session_members():
            if pid not in self._workers and (used := cpu_s(pid)) is not None:
                found[pid] = used
        return found, time.process_time() - time.thread_time()


def session_members() -> list[int]:
    """Process ids of all processes in the session of this one."""
    own = os.getsid(0)
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == own:
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended
    return found


def cpu_s(pid: int) -> float | None:
    """CPU seconds that a process has used so far, those of threads that have ended included; None where
    there is no such process any more.

    Args:
        pid: process id.
    """
    try:
        return time.clock_gettime(~pid << 3 | _SCHEDULED)
    except OSError:
        return None
