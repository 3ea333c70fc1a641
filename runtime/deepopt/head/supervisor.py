"""The supervisor: a process that owns a job's Ray, outlives the terminal and leaves nothing behind.

`spawn_supervisor` starts it detached; `python -m deepopt.head.supervisor RUN_DIR` is it. It starts
or joins the cluster, creates the head, forwards requests, and takes everything down by pid.
SIGTERM asks for a clean stop, a second one kills. Its end: no process, no temporary folder.
Importing this module loads neither Ray nor torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from deepopt.cluster.group import STAGE_WORKER
from deepopt.cluster.last_will import LastWill
from deepopt.cluster.process_table import become_subreaper, this_process
from deepopt.errors import ClusterError, DeepoptError
from deepopt.head.head_watch import HeadWatch
from deepopt.head.run_lock import lock_run_directory
from deepopt.head.state import JobState
from deepopt.head.supervision import (
    end_without_head,
    job_id_of,
    leftover_temp_dir,
    show_starting,
    take_requests,
    write_supervisor,
)
from deepopt.run_directory import RunDirectory

if TYPE_CHECKING:
    from deepopt.cluster.slots import Slots
    from deepopt.config import JobConfig
    from deepopt.head.actor import HeadArguments

logger = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks for requests
START_SLACK_S = 30.0  # for the parts of a start, which have the same deadline, to end first
KILL_GRACE_S = 40.0  # for the head to kill its workers and to write down the end
EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Another value whenever a file was replaced; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Cluster(Protocol):
    """What the supervisor needs of a cluster."""

    node_ip: str
    slots: Slots

    def close(self) -> list[str]:
        """Take down what belongs to the job; returns what could not be removed."""
        ...


class _Interrupted(BaseException):
    """A signal came while nothing was running that could be stopped cleanly."""


def spawn_supervisor(run_dir: Path, *, stage_worker: str = STAGE_WORKER) -> int:
    """Start the supervisor of a run in a session of its own; it inherits the run's lock.

    Args:
        run_dir: a run directory with job, model and plan in it.
        stage_worker: import path of the workers' class; tests have others.

    Returns:
        Its process id; the caller is its parent.

    Raises:
        RunDirectoryError: another supervisor has the run, or the folder cannot be written.
    """
    run = RunDirectory(run_dir.absolute())
    lock = lock_run_directory(run.root)
    try:
        run.logs.mkdir(exist_ok=True)
        show_starting(run)
        take_requests(run)  # what is left was meant for an earlier launch
        command = [sys.executable, "-m", "deepopt.head.supervisor", str(run.root)]
        command += ["--lock", str(lock), "--stage-worker", stage_worker]
        os.set_inheritable(lock, True)
        log = str(run.logs / "supervisor.log")
        return os.posix_spawn(
            sys.executable,
            command,
            os.environ,
            setsid=True,
            setsigmask=_SIGNALS,  # until it can take them
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
    finally:
        os.close(lock)


class Supervisor:
    """Starts, attends and takes down one launch of a job.

    Args:
        run: the run directory; its lock is held.
        stage_worker: import path of the workers' class.
    """

    def __init__(self, run: RunDirectory, *, stage_worker: str) -> None:
        self._run = run
        self._stage_worker = stage_worker
        self._cluster: Cluster | None = None
        self._temp_dir: Path | None = None
        self._interruptible = True
        self._last_will: LastWill | None = None
        self._stops = 0  # requests to stop, by signal or file
        self._forwarded = 0
        self._preempted = False  # by SIGTERM
        self._kill_by_s: float | None = None

    def supervise(self) -> int:
        """Do everything.

        Returns:
            The exit code of the job.
        """
        state, exit_code, error = JobState.STOPPED, 0, None
        told = False
        try:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            self._take_signals()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            state, exit_code = self._launch()
            told = True
        except (_Interrupted, SystemExit):
            logger.info("stopped before the head was there")
        except DeepoptError as failure:
            logger.exception("failed")
            state, exit_code, error = JobState.FAILED, failure.exit_code, failure
        except Exception as failure:  # the process's edge
            logger.exception("failed")
            state, exit_code = JobState.FAILED, 1
            error = DeepoptError(
                f"the supervisor failed: {type(failure).__name__}: {failure}",
                remedy="this is a bug in deepopt: please report it with logs/supervisor.log",
            )
        finally:
            self._interruptible = False
            self._tear_down()
        if not told:
            end_without_head(self._run, state=state, exit_code=exit_code, error=error)
        logger.info("%s, exit code %d", state, exit_code)
        return exit_code

    def _launch(self) -> tuple[JobState, int]:
        become_subreaper()
        if os.getsid(0) == os.getpid():
            self._last_will = LastWill()
        from deepopt.job_file import load_job

        job = load_job(self._run.job)
        job_id = job_id_of(self._run, name=job.name)
        self._clear_leftovers()
        with self._start_deadline(job.cluster.start_timeout_s):
            self._cluster = self._start_cluster(job, job_id=job_id)
        self._take_signals()  # Ray has put its own handler in place
        return self._attend(job, self._cluster, job_id=job_id)

    def _start_cluster(self, job: JobConfig, *, job_id: str) -> Cluster:
        from deepopt.cluster.choose import start_cluster
        from deepopt.planner.plan import Plan
        from deepopt.telemetry.files import read_json

        def note(temp_dir: Path | None) -> None:
            self._temp_dir = temp_dir
            if temp_dir is not None and self._last_will is not None:
                self._last_will.add_folder(temp_dir)
            write_supervisor(
                self._run,
                process=this_process(),
                job_id=job_id,
                temp_dir=temp_dir,
            )

        note(None)
        num_workers = Plan.from_json(read_json(self._run.plan)).world_size
        return start_cluster(
            job,
            num_workers=num_workers,
            namespace=job_id,
            python_path=os.environ.get("PYTHONPATH", ""),
            note=note,
        )

    def _attend(self, job: JobConfig, cluster: Cluster, *, job_id: str) -> tuple[JobState, int]:
        """Create the head and wait for its end; one that dies is replaced."""
        from ray.exceptions import RayActorError, RayTaskError

        from deepopt.head.actor import HeadArguments

        arguments = HeadArguments(
            run_dir=str(self._run.root),
            job_id=job_id,
            slots=cluster.slots,
            node_ip=cluster.node_ip,
            supervisor_pid=os.getpid(),
            stage_worker=self._stage_worker,
        )
        died_s: list[float] = []
        self._interruptible = False
        while True:
            try:
                return self._attend_head(job, arguments)
            except RayTaskError as error:
                if isinstance(error.cause, DeepoptError):
                    raise error.cause from error
                raise
            except RayActorError as error:
                now_s, faults = time.monotonic(), job.faults
                logger.warning("the head's process is gone: %s", str(error).strip())
                if self._stops > 1:
                    raise _Interrupted from error
                died_s = [at_s for at_s in died_s if now_s - at_s < faults.window_s]
                if len(died_s) >= faults.max_head_restarts:
                    raise ClusterError(
                        f"the head's process is gone for the {len(died_s) + 1}. time within "
                        f"faults.window_s ({faults.window_s:g} s), faults.max_head_restarts "
                        f"allows {faults.max_head_restarts}",
                        remedy="see logs/head.log; `deepopt resume` goes on from the newest "
                        "checkpoint",
                    ) from error
                died_s.append(now_s)
                arguments = succeed(arguments, died_s=now_s, log=self._run.logs / "head.log")

    def _attend_head(self, job: JobConfig, arguments: HeadArguments) -> tuple[JobState, int]:
        """Create one head and wait for its end.

        Raises:
            RayActorError: it died.
            RayTaskError: it could not begin.
        """
        import ray
        from deepopt.head.actor import create_head

        head = create_head(arguments)
        self._forwarded = 0  # what was asked of a head before is asked again
        ended = head.run.remote()
        # Told by Ray: asking it ten times a second costs more than all else in this process.
        is_over = threading.Event()
        ended.future().add_done_callback(lambda _: is_over.set())

        def ask(take: Callable[[Any], None]) -> None:
            head.alive.remote().future().add_done_callback(
                lambda answer: None if answer.exception() else take(answer.result())
            )

        watch = HeadWatch(ask, now_s=time.monotonic())
        while not is_over.wait(POLL_S):
            self._forward(head, job)
            watch.look(now_s=time.monotonic(), sign=_stamp(self._run.status))
        outcome = ray.get(ended)
        return JobState(outcome.state), outcome.exit_code

    def _forward(self, head: Any, job: JobConfig) -> None:
        """Pass requests on to the head; end it when it does not heed them in time."""
        for kind in take_requests(self._run):
            if kind == "checkpoint":
                head.request.remote("checkpoint")
            else:
                self._stops += 2 if kind == "kill" else 1
        now_s = time.monotonic()
        if self._stops > self._forwarded:
            kill = self._stops > 1
            asked = "preempt" if self._preempted else "stop"
            head.request.remote("kill" if kill else asked)
            faults = job.faults
            grace_s = 0.0 if kill else faults.stop_grace_s + job.checkpoint.timeout_s
            if self._preempted and not kill:
                grace_s = faults.grace_s
            self._kill_by_s = now_s + grace_s + KILL_GRACE_S
            self._forwarded = self._stops
        if self._kill_by_s is not None and now_s > self._kill_by_s:
            logger.warning("the head did not end in time; taking everything down")
            raise _Interrupted

    # --- start and end -------------------------------------------------------------------

    def _take_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._stops += 1
        self._preempted |= number == signal.SIGTERM
        logger.info("got %s", signal.Signals(number).name)
        if self._interruptible:
            raise _Interrupted

    @contextmanager
    def _start_deadline(self, timeout_s: float) -> Iterator[None]:
        def expire() -> None:
            # Ray may be waiting in C++, where the main thread takes neither signals nor errors.
            error = ClusterError(
                f"the cluster did not start within cluster.start_timeout_s ({timeout_s:g} s)",
                remedy="see logs/supervisor.log; raise cluster.start_timeout_s on a slow machine",
            )
            logger.error("%s", error.message)
            end_without_head(
                self._run, state=JobState.FAILED, exit_code=error.exit_code, error=error
            )
            os._exit(error.exit_code)  # the last will does the rest

        timer = threading.Timer(timeout_s + START_SLACK_S, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _clear_leftovers(self) -> None:
        """Remove what an earlier supervisor of this run left when it was killed."""
        from deepopt.cluster.ray_node import remove_temp_dir

        folder = leftover_temp_dir(self._run)
        if folder is not None:
            logger.info("removing %s, left by an earlier supervisor", folder)
            remove_temp_dir(folder)

    def _tear_down(self) -> None:
        from deepopt.cluster.local import close_own_ray

        left: list[str] = []
        try:
            if self._cluster is not None:
                left = self._cluster.close()
            elif self._temp_dir is not None:  # it failed half-way
                left = close_own_ray(self._temp_dir)
        except Exception:  # the process's edge: the last will does the rest
            logger.exception("taking the cluster down failed")
            return
        for what in left:
            logger.warning("could not remove %s", what)
        if self._last_will is not None and not left:
            self._last_will.revoke()


def succeed(arguments: HeadArguments, *, died_s: float, log: Path) -> HeadArguments:
    """What the next head is told.

    Args:
        arguments: of the one that died.
        died_s: when that was noticed, on this machine's monotonic clock.
        log: its log, which may tell of a crash.
    """
    from deepopt.cluster.crash_log import read_crash
    from deepopt.head.actor import Predecessor

    crash = read_crash(log, start=0).headline
    reason = (
        f"the head's process crashed: {crash}" if crash else "the head's process was killed"
    )
    return replace(arguments, predecessor=Predecessor(died_s=died_s, reason=reason))


def main() -> None:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="python -m deepopt.head.supervisor")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--lock", type=int, default=None, help="inherited lock descriptor")
    parser.add_argument("--stage-worker", default=STAGE_WORKER)
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    run = RunDirectory(arguments.run_dir.absolute())
    if arguments.lock is None:
        try:
            lock_run_directory(run.root)
        except DeepoptError as error:
            sys.exit(f"error: {error.message}\n\nhint: {error.remedy}")
    else:
        os.set_inheritable(arguments.lock, False)  # what Ray starts must not hold it
    code = Supervisor(run, stage_worker=arguments.stage_worker).supervise()
    logging.shutdown()
    os._exit(code)  # Ray's and torch's exit hooks have nothing left to do


if __name__ == "__main__":
    main()
