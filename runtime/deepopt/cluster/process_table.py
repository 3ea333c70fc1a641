"""Linux processes by pid and start time, so that a reused pid is never taken for its predecessor.

Reads `/proc`; knows nothing of Ray.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Process:
    """One process for its whole life.

    Args:
        pid: process id.
        start_time: in clock ticks since boot, field 22 of `/proc/PID/stat`.
    """

    pid: int
    start_time: int

    def is_alive(self) -> bool:
        """Whether any of its threads still runs; of a zombie none does."""
        found = _read_stat(self.pid)
        return found is not None and found.start_time == self.start_time and found.runs

    def send(self, number: signal.Signals) -> bool:
        """Send a signal, if it is still the same process.

        Returns:
            Whether there was a process to send it to.
        """
        if not self.is_alive():
            return False
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


@dataclass(frozen=True, slots=True)
class _Stat:
    start_time: int
    parent: int
    session: int
    state: str
    threads: int

    @property
    def runs(self) -> bool:
        """Whether a thread is left. The first one is a zombie as soon as it ends, while others, told to end
        by the same signal, may still be forking or writing a file."""
        return self.state not in "ZX" or self.threads > 1


def _read_stat(pid: int) -> _Stat | None:
    try:
        content = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The second field is the command in parentheses and may hold anything, also parentheses.
    fields = content[content.rindex(")") + 2 :].split()
    return _Stat(
        start_time=int(fields[19]),
        parent=int(fields[1]),
        session=int(fields[3]),
        state=fields[0],
        threads=int(fields[17]),
    )


def this_process() -> Process:
    """The calling process."""
    process = find_process(os.getpid())
    assert process is not None, "/proc lacks the calling process"
    return process


def find_process(pid: int) -> Process | None:
    """The process that has a pid now; None when there is none."""
    found = _read_stat(pid)
    return None if found is None else Process(pid, found.start_time)


def become_subreaper() -> None:
    """Adopt orphans among this process's descendants, so that they stay its descendants."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(code)}")


def descendants(pid: int) -> list[Process]:
    """All living processes below one, parents before their children."""
    # Through zombies: a child is handed on only when the last thread of its parent has ended.
    children: dict[int, list[tuple[Process, bool]]] = defaultdict(list)
    for process, stat in _all():
        children[stat.parent].append((process, stat.runs))
    below: list[Process] = []
    queue = [pid]
    while queue:
        for process, runs in children.pop(queue.pop(), []):
            if runs:
                below.append(process)
            queue.append(process.pid)
    return below


def session_members(session: int) -> list[Process]:
    """All living processes of a session, its leader included.

    Args:
        session: process id of the leader; it need not live any more.
    """
    return [process for process, stat in _all() if stat.session == session and stat.runs]


def _all() -> Iterator[tuple[Process, _Stat]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            found = _read_stat(int(entry.name))
            if found is not None:
                yield Process(int(entry.name), found.start_time), found


def kill_descendants(*, timeout_s: float) -> list[Process]:
    """Kill everything below the calling process, again and again until it has no child.

    A look at `/proc` is no snapshot: one that finds nothing may have missed a child that was handed on
    meanwhile. The kernel's word that there is no child is one, for who adopts orphans.

    Args:
        timeout_s: how long at most.

    Returns:
        What is still there after the timeout.
    """
    until_s = time.monotonic() + timeout_s
    while True:
        left = descendants(os.getpid())
        for process in left:
            process.send(signal.SIGKILL)
        if not _has_children():
            return []
        if time.monotonic() > until_s:
            return left
        time.sleep(_POLL_S)


def _has_children() -> bool:
    """Reap what has ended; whether anything else is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def wait_until_gone(processes: Iterable[Process], *, timeout_s: float) -> list[Process]:
    """Wait for processes to end.

    Returns:
        Those that are still there after the timeout.
    """
    until_s = time.monotonic() + timeout_s
    left = [process for process in processes if process.is_alive()]
    while left and time.monotonic() < until_s:
        time.sleep(_POLL_S)
        left = [process for process in left if process.is_alive()]
    return left
