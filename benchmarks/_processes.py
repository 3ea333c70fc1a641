"""A command and everything it starts: its CPU time, and its end.

Children of launchers leave their session and even their parent, so they are found by a mark in
their environment, which every descendant inherits. Linux only: it reads /proc.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from _thread_use import Thread, Use, look

_MARK = "DEEPOPT_BENCHMARK_RUN"
_BETWEEN_INTERRUPTS_S = 2.0
_POLL_S = 0.05


class StartedCommand:
    """A running command with its descendants; made by `started`.

    Args:
        command: program and arguments.
        log: takes its stdout and stderr.
        environment: added to this process's own.
        grace_s: time to end by itself before it is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str],
        grace_s: float,
    ) -> None:
        self._grace_s = grace_s
        self._mark = f"{_MARK}={uuid.uuid4().hex}".encode()
        name, _, value = self._mark.decode().partition("=")
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(environment) | {name: value},
                start_new_session=True,
            )

    def check(self) -> bool:
        """Whether the command has ended well.

        Raises:
            RuntimeError: it ended badly; the end of its log is in the message.
        """
        code = self._process.poll()
        if code is None:
            return False
        if code != 0:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{self._process.args!r} ended with code {code}:\n{tail}")
        return True

    def wait(self, *, timeout_s: float) -> None:
        """Wait for the command's good end.

        Raises:
            RuntimeError: it ended badly.
            TimeoutError: it did not end in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.check():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._process.args!r} did not end in {timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def cpu_s(self) -> float:
        """CPU seconds that the command's processes that live now have used."""
        ticks = 0
        for pid in self._pids():
            try:
                # After the name, which may hold spaces: field 14 is utime, 15 is stime.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def threads(self) -> dict[Thread, Use]:
        """What the command's threads that live now have used."""
        return look(self._pids())

    def pause(self) -> None:
        """Stop every process of the command where it is; `resume` goes on."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let every process of the command go on."""
        self._signal_all(signal.SIGCONT)

    def end(self) -> None:
        """Ask the command to end, then kill whatever it left."""
        self.resume()
        # Twice Ctrl-C: deepopt stops cleanly at the first and kills at the second; torchrun
        # ends at the first.
        for _ in range(2):
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
                self._wait_until_gone(_BETWEEN_INTERRUPTS_S)
        self._wait_until_gone(self._grace_s)
        self._kill_all()
        self._wait_until_gone(self._grace_s)
        self._process.wait()

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    def _kill_all(self) -> None:
        """Kill every process of the command and wait until it has ended: what it is found by goes before."""
        deadline = time.monotonic() + self._grace_s
        ends = []
        for pid in self._pids():
            with suppress(ProcessLookupError):  # it has just ended
                ends.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(ends[-1], signal.SIGKILL)
        for end in ends:
            select.select([end], [], [], max(0.0, deadline - time.monotonic()))
            os.close(end)

    def _wait_until_gone(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and any(self._pids()):
            self._process.poll()  # takes its exit code: without that it stays in /proc
            time.sleep(_POLL_S)

    def _pids(self) -> Iterator[int]:
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                marks = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or belongs to somebody else
                continue
            if self._mark in marks:
                yield int(folder.name)


def machine_cpu_s() -> float:
    """CPU seconds that all programs of this machine have used since its start."""
    # user, nice, system, idle, iowait, irq, softirq
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def end_cleanly_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind this program like Ctrl-C, so that `started` can clean up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def started(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    grace_s: float = 15.0,
) -> Iterator[StartedCommand]:
    """Run a command for the duration of a `with` block; nothing of it is left behind.

    Args:
        command: program and arguments.
        log: takes its stdout and stderr.
        environment: added to this process's own.
        grace_s: time that it may take to end by itself when it is interrupted.
    """
    running = StartedCommand(command, log=log, environment=environment or {}, grace_s=grace_s)
    try:
        yield running
    finally:
        running.end()
