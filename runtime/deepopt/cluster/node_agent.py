"""A process of its own on each host of a job: watches the workers there, tells why one is silent, kills.

No training runs in it and it imports no torch, so nothing can starve it. It tells of an exit at once
(a pidfd becomes readable), and of every worker's state and CPU time twice a second: that is the
second sign that the head waits for before it kills. `cluster.node_agents` puts it into a Ray actor.

It holds a lease on its listener: when nobody has taken its words for `lease_s`, the head, its host or the
link to it is gone for good, and it kills the workers here, so that they hold no device and commit nothing.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deepopt.cluster.process_look import (
    ProcessLook,
    exit_status,
    exit_words,
    look_at,
    memory_kills,
)

logger = logging.getLogger(__name__)

LOOK_S = 0.5  # between two looks at the workers; also how often the head hears from a host


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentWord:
    """What an agent sees of the workers on its host.

    Args:
        host: host name.
        looks: by process id.
    """

    host: str
    looks: Mapping[int, ProcessLook] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEnded:
    """A worker's process has ended.

    Args:
        host: host name.
        pid: its process id.
        how: signal or exit code, for people; empty when the kernel does not say.
        at_s: when the agent saw it, on its host's monotonic clock; None: not told.
    """

    host: str
    pid: int
    how: str
    at_s: float | None = field(default=None, compare=False)


Tell = Callable[[AgentWord | ProcessEnded], bool]


class NodeAgent:
    """Watches processes until `close`.

    Args:
        tell: takes a word; returns whether the listener has taken those before it.
        lease_s: how long it goes on without a listener.
        lease_over: called after the workers were killed because the lease is over.
        look_s: between two looks.
    """

    def __init__(
        self,
        *,
        tell: Tell,
        lease_s: float,
        lease_over: Callable[[], None] = lambda: None,
        look_s: float = LOOK_S,
    ) -> None:
        self._tell = tell
        self._lease_over = lease_over
        self._lease_s = lease_s
        self._look_s = look_s
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._pidfds: dict[int, int] = {}
        self._looks: dict[int, ProcessLook] = {}
        self._poll = select.epoll()
        self._waker, self._wake = os.pipe()
        self._poll.register(self._waker, select.EPOLLIN)
        self._memory_kills = memory_kills()
        self._closed = False
        self._heard_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="node-agent", daemon=True)
        self._thread.start()

    def watch(self, pid: int) -> bool:
        """Watch a process from now on.

        Returns:
            False when there is none.
        """
        with self._lock:
            if pid in self._pidfds:
                return True
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                return False
            self._pidfds[pid] = pidfd
            self._poll.register(pidfd, select.EPOLLIN)
        return True

    def kill(self, pids: Sequence[int]) -> None:
        """Kill watched processes by SIGKILL; a pid that others have got since is left alone."""
        with self._lock:
            pidfds = [self._pidfds[pid] for pid in pids if pid in self._pidfds]
            for pidfd in pidfds:
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    logger.info("a process to be killed had ended")

    def living(self) -> list[int]:
        """The watched processes that have not ended."""
        with self._lock:
            return list(self._pidfds)

    def close(self) -> None:
        """Watch no longer; the processes are left alone."""
        self._closed = True
        os.write(self._wake, b"x")
        self._thread.join()
        for descriptor in (*self._pidfds.values(), self._waker, self._wake):
            os.close(descriptor)
        self._poll.close()

    def _run(self) -> None:
        looked_s = time.monotonic()
        while not self._closed:
            now_s = time.monotonic()
            ready = self._poll.poll(max(0.0, looked_s + self._look_s - now_s))
            self._take_ends({descriptor for descriptor, _ in ready}, at_s=time.monotonic())
            now_s = time.monotonic()
            if now_s - looked_s >= self._look_s:
                self._look(elapsed_s=now_s - looked_s)
                looked_s = now_s

    def _take_ends(self, ready: set[int], *, at_s: float) -> None:
        with self._lock:
            ended = [(pid, pidfd) for pid, pidfd in self._pidfds.items() if pidfd in ready]
        for pid, pidfd in ended:
            kills = memory_kills()
            how = exit_words(
                exit_status(pid, pidfd=pidfd), out_of_memory=kills > self._memory_kills
            )
            self._memory_kills = kills
            with self._lock:
                self._poll.unregister(pidfd)
                del self._pidfds[pid]
                self._looks.pop(pid, None)
            os.close(pidfd)
            self._tell(ProcessEnded(host=self._host, pid=pid, how=how, at_s=at_s))

    def _look(self, *, elapsed_s: float) -> None:
        with self._lock:
            pids = list(self._pidfds)
        looks = {}
        for pid in pids:
            look = look_at(pid, before=self._looks.get(pid), elapsed_s=elapsed_s)
            if look is not None:
                looks[pid] = look
        self._looks = looks
        now_s = time.monotonic()
        if self._tell(AgentWord(host=self._host, looks=looks)):
            self._heard_s = now_s
        elif now_s - self._heard_s > self._lease_s:
            logger.warning(
                "nobody has listened for %.0f s: killing %d workers here",
                now_s - self._heard_s,
                len(pids),
            )
            self.kill(pids)
            self._lease_over()
