"""A process of its own on each further host of a job: the head's hand there, which can kill.

No training runs in it, so nothing can starve it.
"""

from __future__ import annotations

import signal

from deepopt.cluster.process_table import Process, find_process


class HostAgent:
    """Knows the workers on its host by pid and start time."""

    def __init__(self) -> None:
        self._workers: dict[int, Process] = {}

    def watch(self, pid: int) -> None:
        """Note a worker that has just started."""
        if (process := find_process(pid)) is not None:
            self._workers[pid] = process

    def kill(self, pids: list[int]) -> None:
        """Kill workers by SIGKILL; other processes are left alone."""
        for pid in pids:
            if pid in self._workers:
                self._workers[pid].send(signal.SIGKILL)

    def living(self) -> list[int]:
        """The workers that still run."""
        return [pid for pid, process in self._workers.items() if process.is_alive()]
