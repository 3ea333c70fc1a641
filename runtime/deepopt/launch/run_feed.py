"""What is new in the files of a run directory, for whoever looks on; the job is not touched.

Unlike `Follower`, which stays with the launch that it made, this works on any run at any time: one that
runs detached, on another host, or has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from deepopt.launch.run_view import ENDED, read_status, read_supervisor
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import JsonLinesTail


class Onlooker(Protocol):
    """Takes what the files say."""

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`."""
        ...

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        ...

    def event(self, record: Mapping[str, Any]) -> None:
        """A line of `events.jsonl`."""
        ...

    def loads(self, record: Mapping[str, Any]) -> None:
        """A line of `expert_loads.jsonl`."""
        ...


class RunFeed:
    """The files of one run, each line once; the first look begins with the first line.

    Args:
        run: the run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._metrics = JsonLinesTail(run.metrics)
        self._events = JsonLinesTail(run.events)
        self._loads = JsonLinesTail(run.expert_loads)

    def look(self, onlooker: Onlooker) -> bool:
        """Hand over what is new.

        Args:
            onlooker: takes it.

        Returns:
            Whether more may come: the job has not ended, and its supervisor is not known to be gone.

        Raises:
            RunDirectoryError: a file is damaged.
        """
        # Asked first: what it wrote last is on disk by the time that it is gone.
        supervisor = read_supervisor(self._run)
        gone = supervisor is not None and supervisor.lives() is False
        status = read_status(self._run)
        if status is not None:
            onlooker.status(status)
        for record in self._metrics.read_new():
            onlooker.step(record)
        for record in self._loads.read_new():
            onlooker.loads(record)
        for record in self._events.read_new():
            onlooker.event(record)
        return not gone and (status or {}).get("state") not in ENDED
