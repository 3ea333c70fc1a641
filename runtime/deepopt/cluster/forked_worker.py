"""What a raylet starts for a worker: asks the host's `fork_server` for a process, or becomes one.

Runs by path, in place of Ray's `setup_worker.py` and with its arguments, for a few milliseconds: it
imports a few modules of Python and nothing of Ray, torch or deepopt.
"""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from pathlib import Path

SOCKET_VARIABLE = "DEEPOPT_FORK_SOCKET"  # where this host's server is asked
GO = b"go"
ANSWER_TIMEOUT_S = (
    20.0  # Ray gives a worker a minute; this leaves time to start it without the server
)
_HEADER_BYTES = 8  # length of what follows
_STREAMS = 3
# What Python, glibc, numerical libraries and Ray read once, when a process starts or loads them.
_START_PREFIXES = (
    *("PYTHON", "LD_", "MALLOC_", "GLIBC_"),
    *("OMP_", "MKL_", "KMP_", "OPENBLAS_", "RAY_"),
)
JOB_VARIABLE = "RAY_JOB_ID"  # the one of them that a worker can do without


class Request:
    """What a forked process shall be.

    Args:
        arguments: script and arguments.
        environment: all variables.
        folder: its current folder.
    """

    def __init__(
        self, *, arguments: list[str], environment: dict[str, str], folder: str
    ) -> None:
        self.arguments = arguments
        self.environment = environment
        self.folder = folder


def start_settings(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The variables that a process can only take over when it starts."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_START_PREFIXES) and name != JOB_VARIABLE
    }


def send_request(connection: socket.socket, request: Request) -> None:
    """Send what a process shall be, and this process's standard streams.

    Args:
        connection: to the server.
        request: what it shall be.
    """
    body = json.dumps(vars(request)).encode("utf-8", "surrogateescape")
    streams = array.array("i", range(_STREAMS))
    header = len(body).to_bytes(_HEADER_BYTES, "big")
    connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(body)


def receive_request(connection: socket.socket) -> tuple[Request, list[int]]:
    """The other side of `send_request`.

    Args:
        connection: from a client.

    Returns:
        What the process shall be; descriptors of its streams.

    Raises:
        ValueError: what came is no request.
    """
    header, streams, _, _ = socket.recv_fds(connection, _HEADER_BYTES, _STREAMS)
    try:
        if len(header) != _HEADER_BYTES or len(streams) != _STREAMS:
            raise ValueError(f"{len(header)} bytes and {len(streams)} descriptors")
        length = int.from_bytes(header, "big")
        body = bytearray()
        while len(body) < length:
            part = connection.recv(length - len(body))
            if not part:
                raise ValueError(f"{len(body)} of {length} bytes")
            body += part
        return Request(**json.loads(body.decode("utf-8", "surrogateescape"))), streams
    except BaseException:
        for stream in streams:
            os.close(stream)
        raise


def forked_arguments(arguments: list[str]) -> list[str] | None:
    """The worker's script and arguments; None where its environment is not that of the raylet.

    Args:
        arguments: of Ray's set-up of a worker.
    """
    own: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value or "{}")
            if context.pop("py_executable", None) not in (None, sys.executable):
                return None
            if any(context.values()):
                return None
        elif name == "--language":
            if value != "PYTHON":
                return None
        else:
            own.append(argument)
    return own if own and own[0].endswith(".py") else None


def ask(path: str, arguments: list[str]) -> bool:
    """Have the server fork a worker.

    Args:
        path: of its socket.
        arguments: script and arguments.

    Returns:
        Whether the worker runs; otherwise there is none, and will be none.
    """
    request = Request(arguments=arguments, environment=dict(os.environ), folder=str(Path.cwd()))
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(path)
            send_request(connection, request)
            if not connection.recv(16):  # its process id
                return False
            connection.sendall(GO)
            return True
    except OSError:
        return False


def main() -> None:
    """The process's entry."""
    arguments, path = sys.argv[1:], os.environ.get(SOCKET_VARIABLE)
    worker = forked_arguments(arguments)
    if path and worker is not None and ask(path, worker):
        return
    # Ray's own set-up lies beside its worker.
    script = next(argument for argument in arguments if not argument.startswith("-"))
    set_up = Path(script).with_name("setup_worker.py")
    os.execv(sys.executable, [sys.executable, str(set_up), *arguments])


if __name__ == "__main__":
    main()
