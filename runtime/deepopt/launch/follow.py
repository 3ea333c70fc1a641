"""Follows a job by the files of its run directory until it ends; passes Ctrl-C on as requests.

The job does not need this process: it may end, or be started again by `status` and `logs`, at any
moment. What is shown, and how, is the view's part.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from deepopt.clock import Clock, SystemClock
from deepopt.cluster.ray_node import remove_temp_dir
from deepopt.head.supervision import leftover_temp_dir
from deepopt.launch.run_view import ENDED, Supervisor, read_status, request
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import JsonLinesTail

POLL_S = 0.2  # a step line appears within this time
KILL_GRACE_S = 50.0  # more than the supervisor gives its head; it cleans up better than we can
TEARDOWN_TIMEOUT_S = 30.0  # the supervisor's time to remove its Ray after the job has ended


class View(Protocol):
    """Shows a job while it is followed."""

    def status(self, status: Mapping[str, Any]) -> None:
        """The present content of `status.json`, whether it changed or not."""
        ...

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        ...

    def event(self, record: Mapping[str, Any]) -> None:
        """A line of `events.jsonl`."""
        ...

    def note(self, text: str) -> None:
        """A remark of the command line itself."""
        ...

    def close(self) -> None:
        """The job is followed no longer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How following ended.

    Args:
        status: the last status of this launch; None when the head never wrote one.
        ended: whether the job reached a state that it does not leave by itself.
        interrupts: how often Ctrl-C was pressed.
    """

    status: Mapping[str, Any] | None
    ended: bool
    interrupts: int


class Interrupts:
    """Counts SIGINT and SIGTERM instead of dying from them, while it is entered.

    Only the main thread can take signals: entered in another one it counts nothing.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


class Follower:
    """Follows one launch of a job.

    Make it before the supervisor is started: figures and events that are in the files by then
    belong to an earlier launch and are left out. The status is replaced with the start itself.

    Args:
        run: the run directory.
        interrupts: entered by the caller.
        clock: for the named waits.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        interrupts: Interrupts,
        clock: Clock | None = None,
    ) -> None:
        self._run = run
        self._interrupts = interrupts
        self._clock = clock or SystemClock()
        self._metrics = JsonLinesTail(run.metrics, at_end=True)
        self._events = JsonLinesTail(run.events, at_end=True)
        self._handled = 0
        self._status: dict[str, Any] | None = None
        self._status_stamp: tuple[int, int] | None = None  # of the file that was read
        self._killed_s: float | None = None

    def follow(self, supervisor: Supervisor, *, view: View) -> Outcome:
        """Show the job until it has ended and its supervisor is gone, or until that dies.

        Args:
            supervisor: of this launch.
            view: shows what comes.
        """
        status: dict[str, Any] | None = None
        while True:
            lives = supervisor.lives()  # asked before reading: its last words count
            status = self._look(view) or status
            ended = status is not None and status.get("state") in ENDED
            if ended or not lives:
                break
            self._pass_interrupts_on(supervisor, view)
            time.sleep(POLL_S)
        if ended:
            self._await_teardown(supervisor, view)
            status = self._look(view) or status
        return Outcome(status=status, ended=ended, interrupts=self._interrupts.count)

    def _look(self, view: View) -> dict[str, Any] | None:
        """Show what is new; return the status."""
        status = self._read_status()  # first: the figures it speaks of are on disk by then
        if status is not None:
            view.status(status)
        for record in self._metrics.read_new():
            view.step(record)
        for record in self._events.read_new():
            view.event(record)
        return status

    def _read_status(self) -> dict[str, Any] | None:
        """The status; read anew only when the file was replaced."""
        try:
            found = self._run.status.stat()
        except FileNotFoundError:
            return None
        stamp = (found.st_ino, found.st_mtime_ns)
        if self._status is None or stamp != self._status_stamp:
            self._status, self._status_stamp = read_status(self._run), stamp
        return self._status

    def _pass_interrupts_on(self, supervisor: Supervisor, view: View) -> None:
        now_s = self._clock.monotonic_s()
        while self._handled < self._interrupts.count:
            self._handled += 1
            if self._handled == 1:
                request(self._run, kind="stop", checkpoint=True)
                view.note(
                    "stopping after this step, with a checkpoint; Ctrl-C again kills the job"
                )
            elif self._handled == 2:
                request(self._run, kind="kill")
                self._killed_s = now_s
                view.note("killing the job; Ctrl-C again does not wait for its supervisor")
            else:
                self._kill(supervisor)
        if self._killed_s is not None and now_s - self._killed_s > KILL_GRACE_S:
            view.note(f"the supervisor did not end within {KILL_GRACE_S:g} s: SIGKILL")
            self._kill(supervisor)
            self._killed_s = now_s

    def _kill(self, supervisor: Supervisor) -> None:
        """End the supervisor and all below it, and remove the Ray folder that it cannot now."""
        supervisor.kill()
        folder = leftover_temp_dir(self._run)
        if folder is not None:
            remove_temp_dir(folder)

    def _await_teardown(self, supervisor: Supervisor, view: View) -> None:
        deadline_s = self._clock.monotonic_s() + TEARDOWN_TIMEOUT_S
        patience = self._interrupts.count + 1
        while supervisor.lives():
            if self._interrupts.count > patience:
                self._kill(supervisor)
            if self._clock.monotonic_s() > deadline_s:
                view.note(
                    f"warning: supervisor {supervisor.pid} still runs {TEARDOWN_TIMEOUT_S:g} s "
                    f"after the job has ended; see {self._run.logs / 'supervisor.log'}"
                )
                return
            time.sleep(POLL_S / 4)
