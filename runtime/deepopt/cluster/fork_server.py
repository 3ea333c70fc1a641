"""A process of each host that has imported torch and Ray once, and forks Ray's workers.

Every process of a job that Ray starts would import both by itself: two seconds of a CPU for each, at every
start and again for each replacement. A fork takes milliseconds, and the pages of what is imported are shared.

Ray's raylet starts `forked_worker.py` where it would start its own set-up of a worker; that asks here, and
does by itself what Ray would have done where nobody answers. Nothing depends on this process: when it
is gone, workers start as Ray starts them. It has one thread and opens no device, so that what it forks is
like a process that has just imported the same; otherwise it ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from deepopt.cluster.forked_worker import (
    GO,
    JOB_VARIABLE,
    SOCKET_VARIABLE,
    Request,
    receive_request,
    start_settings,
)

logger = logging.getLogger(__name__)

# What heads and workers import; what cannot be imported here is told of by the process that needs it.
WITHOUT_RAY = (
    "torch.distributed",
    "torch.utils._device",
    "deepopt.worker.stage_worker",
    "deepopt.models.moe_transformer",
    "deepopt.head.controller",
)
WITH_RAY = (
    "ray._private.node",
    "ray._common.usage.usage_lib",
    "deepopt.worker.actor",
    "deepopt.head.actor",
    "deepopt.cluster.worker_group",
)
_NO_JOB = "f" * 8  # as Ray writes it; a worker without a job takes that of its first task
LOG_NAME = "fork-server.log"
REAP_AFTER_S = 0.5  # who watches a process by a pidfd may want to read how it ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_GPU_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")  # CUDA, ROCm
_BACKLOG = 128
_MANY_BYTES = 4096
REQUEST_TIMEOUT_S = 5.0  # for the parts of a request to follow each other


def start_fork_server(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start the server as a child of the calling process, and end it with that.

    It can be asked at once; it answers when it has imported everything.

    Args:
        folder: of this cluster alone; for its socket and its log.

    Returns:
        Its process; None where it cannot be started, and workers start without it.
    """
    os.environ.pop(SOCKET_VARIABLE, None)  # of another cluster
    # Hosts may share the folder.
    path = folder / f"fork-{os.getpid()}.sock"
    try:
        with socket.socket(socket.AF_UNIX) as listener, (folder / LOG_NAME).open("ab") as log:
            listener.bind(str(path))
            listener.listen(_BACKLOG)
            # -P: what lies in the current folder is none of its modules.
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "deepopt.cluster.fork_server"),
                    *(str(listener.fileno()), str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(),),
            )
    except OSError as error:
        logger.warning("workers start without a fork server: %s", error)
        return None
    os.environ[SOCKET_VARIABLE] = str(path)  # for what the raylet starts
    return process


class ForkServer:
    """Forks a process for each request.

    Args:
        listener: where requests come in; closed in a forked process.
        load: imports the rest, with the variables of the first request in place: Ray reads
            who its raylet is, and others of them, when it is loaded, and never again.
    """

    def __init__(self, listener: socket.socket, *, load: Callable[[], None]) -> None:
        self._listener = listener
        self._load = load
        self._settings: Mapping[str, str] | None = None  # that all requests must have

    def serve(self) -> Request:
        """Take requests for ever; returns in forked processes, with what they shall be."""
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        has_ended = False
        while True:
            timeout_s = REAP_AFTER_S if has_ended else None
            ready, _, _ = select.select(
                [self._listener.fileno(), wake_reader], [], [], timeout_s
            )
            if wake_reader in ready:
                os.read(wake_reader, _MANY_BYTES)
                has_ended = True
            elif not ready:
                has_ended = False
                _reap()
            if self._listener.fileno() in ready and (request := self._answer()) is not None:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (self._listener.detach(), wake_reader, wake_writer):
                    os.close(number)
                return request

    def _answer(self) -> Request | None:
        """Fork for one request, or hang up, which means no; None in the server."""
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(REQUEST_TIMEOUT_S)
            try:
                request, streams = receive_request(connection)
            except (OSError, ValueError) as error:
                logger.warning("a request could not be read: %s", error)
                return None
            try:
                if self._is_fit_for(request) and os.fork() == 0:
                    _take_over(connection, streams)
                    return request
            except OSError as error:  # no memory, too many processes
                logger.warning("could not fork: %s", error)
            finally:
                for stream in streams:
                    os.close(stream)
        return None

    def _is_fit_for(self, request: Request) -> bool:
        wanted = start_settings(request.environment)
        if self._settings is None:
            mine: Mapping[str, str] = start_settings(os.environ)
            if {name: value for name, value in wanted.items() if name in mine} == mine:
                os.environ.update({**wanted, JOB_VARIABLE: _NO_JOB})
                self._load()
                self._settings = wanted
        else:
            mine = self._settings
        if wanted == self._settings:
            return True
        names = sorted(name for name, _ in wanted.items() ^ mine.items())
        logger.warning("refused, because of other values of %s", ", ".join(names))
        return False


def _take_over(connection: socket.socket, streams: Sequence[int]) -> None:
    """Let who asked go, and take its streams; without its consent this process ends.

    It may have given up and started a process by itself: there must not be two of one name.
    """
    try:
        connection.sendall(str(os.getpid()).encode())
        if connection.recv(len(GO)) != GO:
            os._exit(0)
        os.setpgid(0, 0)  # as the raylet does: it ends a worker's group with the worker
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
    except OSError:
        os._exit(1)


def become(request: Request) -> None:
    """Turn this process, just forked, into what was asked for: as `python SCRIPT ARGUMENTS` would."""
    gc.enable()
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    numbers: Any = sys.modules.get("numpy.random")
    if numbers is not None:  # Python's own generator sees to itself
        numbers.seed()
    script = Path(request.arguments[0])
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(__file__=str(script), __builtins__=__builtins__)
    sys.modules["__main__"] = main_module
    sys.argv = list(request.arguments)
    sys.path.insert(0, str(script.parent))
    exec(compile(script.read_bytes(), str(script), "exec"), main_module.__dict__)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def load(modules: Sequence[str]) -> None:
    """Import modules, as far as they are there.

    Raises:
        RuntimeError: this process must not be forked any more.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            logger.warning("%s cannot be imported: %s", name, error)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads run after the imports")
    if devices := open_gpus():
        raise RuntimeError(f"{devices[0]} is open after the imports")
    # Collections need not look at what is imported, and would copy its pages.
    gc.collect()
    gc.freeze()


def open_gpus(descriptors: Path = Path("/proc/self/fd")) -> list[str]:
    """GPUs that this process has opened: who only counts them has, and CUDA works in no fork of it.

    Args:
        descriptors: folder of links to what is open.
    """
    found = []
    for link in descriptors.iterdir():
        with suppress(OSError):  # that of the folder itself is closed by now
            name = str(link.readlink())
            if name.startswith(_GPU_FILES):
                found.append(name)
    return sorted(found)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent's thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def main() -> None:
    """The process's entry."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    _end_with(int(sys.argv[2]))
    gc.disable()  # imports make little garbage: looking for it takes a fifth of their time
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    server = ForkServer(listener, load=partial(load, WITH_RAY))
    try:
        load(WITHOUT_RAY)
        request = server.serve()
    except Exception:  # the process's edge: nobody depends on it
        logger.exception("workers start without this process from now on")
        os._exit(1)
    become(request)


if __name__ == "__main__":
    main()
