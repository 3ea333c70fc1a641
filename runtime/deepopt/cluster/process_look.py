"""Why a process is silent, or how it ended: what the kernel says of it, from outside.

Reads `/proc` and pidfds of processes that may be anybody's children; knows nothing of Ray or torch.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# linux/pidfd.h: the first 64 bytes of struct pidfd_info, exit_code being the last four of them.
_PIDFD_INFO_BYTES = 64
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO_BYTES << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3  # Linux 6.15; older kernels refuse it


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLook:
    """What a living process is doing.

    Args:
        state: one letter of `/proc/PID/stat`: R runs, S sleeps, D waits for a disk or driver, T is
            stopped by a signal, t by a debugger, Z has ended.
        tracer: process id of its debugger; 0 for none.
        cpu_s: CPU time of all its threads so far, in seconds.
        cpu_share: CPU seconds per second since the look before; None for the first.
    """

    state: str
    tracer: int = 0
    cpu_s: float = 0.0
    cpu_share: float | None = None

    @property
    def is_traced(self) -> bool:
        """Whether a debugger holds it."""
        return self.tracer > 0

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it, and no debugger."""
        return self.state == "T" and not self.is_traced

    def words(self) -> str:
        """What it is doing, for people."""
        if self.is_traced:
            return f"held by a debugger (pid {self.tracer})"
        known = {
            "T": "stopped by a signal",
            "D": "waiting for a disk or a driver",
            "Z": "ended",
        }
        if self.state in known:
            return known[self.state]
        share = "" if self.cpu_share is None else f", {100 * self.cpu_share:.0f} % CPU"
        return ("running" if self.state == "R" else "asleep") + share


def look_at(
    pid: int, *, before: ProcessLook | None = None, elapsed_s: float = 0.0
) -> ProcessLook | None:
    """Look at a process.

    Args:
        pid: its process id.
        before: the look before, for the share of the CPU.
        elapsed_s: seconds since then.

    Returns:
        None when there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return parse_look(stat, status=status, before=before, elapsed_s=elapsed_s)


def parse_look(
    stat: str, *, status: str, before: ProcessLook | None = None, elapsed_s: float = 0.0
) -> ProcessLook:
    """A look from the texts of `/proc/PID/stat` and `/proc/PID/status`."""
    # The second field is the command in parentheses and may hold anything, also parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    tracer = 0
    for line in status.splitlines():
        if line.startswith("TracerPid:"):
            tracer = int(line.split()[1])
            break
    share = None
    if before is not None and elapsed_s > 0:
        share = max(0.0, cpu_s - before.cpu_s) / elapsed_s
    return ProcessLook(state=fields[0], tracer=tracer, cpu_s=cpu_s, cpu_share=share)


def exit_status(pid: int, *, pidfd: int) -> int | None:
    """The wait status of a process that has ended and is not a child of the caller's.

    Args:
        pid: its process id.
        pidfd: opened while it lived.

    Returns:
        None when the kernel does not say: before Linux 6.15, once its parent has taken it.
    """
    with suppress(OSError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return int(fields[-1])
    # The pidfd tells only once the parent has taken it, /proc only until then: so it is asked last.
    request = bytearray(_PIDFD_INFO_BYTES)
    struct.pack_into("=Q", request, 0, _PIDFD_INFO_EXIT)
    with suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, request)
        (found,) = struct.unpack_from("=Q", request, 0)
        if found & _PIDFD_INFO_EXIT:
            (status,) = struct.unpack_from("=i", request, _PIDFD_INFO_BYTES - 4)
            return int(status)
    return None


class ExitLook:
    """How a process of this host ends; made while it lives.

    Args:
        pid: its process id.

    Raises:
        OSError: there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pidfd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._pidfd)

    def words(self, *, timeout_s: float) -> str:
        """How it ended, for people; empty where it has not, or the kernel does not say.

        Args:
            timeout_s: how long to wait for its end at most.
        """
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return ""
        return exit_words(exit_status(self._pid, pidfd=self._pidfd), out_of_memory=False)


def exit_words(status: int | None, *, out_of_memory: bool) -> str:
    """How a process ended, for people.

    Args:
        status: its wait status; None when unknown.
        out_of_memory: whether the kernel killed something on its host for memory just then.
    """
    if status is None:
        return "killed for want of memory" if out_of_memory else ""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in list(signal.Signals) else str(number)
        if number == signal.SIGKILL and out_of_memory:
            return "killed by SIGKILL: the kernel's out-of-memory killer was at work"
        return f"killed by {name}"
    return f"exit code {os.WEXITSTATUS(status)}"


def memory_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Processes that the kernel has killed for want of memory on this host since it started."""
    with suppress(OSError):
        for line in vmstat.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
