"""The fork server with real processes: what it forks is what was asked for, and all else starts as before."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepopt.cluster import forked_worker
from deepopt.cluster.fork_server import load, open_gpus, start_fork_server
from deepopt.cluster.forked_worker import (
    SOCKET_VARIABLE,
    Request,
    forked_arguments,
    receive_request,
    send_request,
)

TIMEOUT_S = 60.0
SOCKET = "fork.sock"
SERVER = """
import socket, sys
from functools import partial
from deepopt.cluster.fork_server import ForkServer, become, load
listener = socket.socket(fileno=int(sys.argv[1]))
become(ForkServer(listener, load=partial(load, ("numpy.random", "colorsys"))).serve())
"""
# What a worker may lean on, and whether it was forked: only the server has loaded colorsys.
WORKER = """
import json, os, random, sys
forked = "colorsys" in sys.modules
import numpy
told = {"forked": forked, "arguments": sys.argv[1:], "mark": os.environ.get("MARK")}
told |= {"folder": os.getcwd(), "leads": os.getpgrp() == os.getpid(), "name": __name__}
told |= {"numbers": [random.random(), numpy.random.random()], "path": sys.path[0]}
told |= {"job": os.environ.get("RAY_JOB_ID"), "server": os.getppid()}
print(json.dumps(told), flush=True)
sys.exit(int(sys.argv[1]))
"""
SET_UP = """
import runpy, sys
sys.argv = [a for a in sys.argv[1:] if not a.startswith("--")]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OWNER = """
import os, sys
from pathlib import Path
from deepopt.cluster.fork_server import SOCKET_VARIABLE, start_fork_server
print(start_fork_server(Path(sys.argv[1])).pid, os.environ[SOCKET_VARIABLE], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """A worker's script, with a set-up like Ray's beside it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup_worker.py").write_text(SET_UP)
    script = tmp_path / "scripts" / "worker.py"
    script.write_text(WORKER)
    return script


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that loads little."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / SOCKET))
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(number)], pass_fds=(number,), env=_environment()
        )
    yield process
    process.kill()
    process.wait()


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "RAY_JOB_ID": "01", "RAY_RAYLET_PID": "1", **more}


def _start(path: Path, worker: Path, *words: str, **more: str) -> Any:
    """Start a worker as a raylet does; what it says."""
    ended = subprocess.run(
        [
            *(sys.executable, forked_worker.__file__, str(worker), *words),
            *("--serialized-runtime-env-context={}", "--language=PYTHON"),
        ],
        env=_environment(**{SOCKET_VARIABLE: str(path)}, **more),
        cwd=worker.parent,
        stdout=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=False,
    )
    return json.loads(ended.stdout)


def _wait_for_end(pid: int, pidfd: int) -> None:
    assert select.select([pidfd], [], [], TIMEOUT_S)[0], f"process {pid} is still there"


def test_a_forked_worker_is_what_a_new_process_would_be(
    server: subprocess.Popen[bytes], tmp_path: Path, worker: Path
) -> None:
    told = _start(tmp_path / SOCKET, worker, "0", "a b", MARK="mine")
    assert told["forked"]
    assert told["server"] == server.pid
    assert told["arguments"] == ["0", "a b"]
    assert (told["mark"], told["folder"]) == ("mine", str(worker.parent))
    assert (told["name"], told["path"]) == ("__main__", str(worker.parent))
    assert told[
        "leads"
    ]  # a raylet ends the group of a worker with it: never that of the server
    assert told["job"] == "01"


def test_forked_workers_draw_random_numbers_of_their_own(
    server: subprocess.Popen[bytes], tmp_path: Path, worker: Path
) -> None:
    one, other = (_start(tmp_path / SOCKET, worker, "0") for _ in range(2))
    assert one["forked"]
    assert other["forked"]
    assert not set(one["numbers"]) & set(other["numbers"])


def test_jobs_may_differ_and_what_is_read_at_a_start_may_not(
    server: subprocess.Popen[bytes], tmp_path: Path, worker: Path
) -> None:
    assert _start(tmp_path / SOCKET, worker, "0")["forked"]
    assert _start(tmp_path / SOCKET, worker, "0", RAY_JOB_ID="02")["forked"]
    assert not _start(tmp_path / SOCKET, worker, "0", RAY_RAYLET_PID="2")["forked"]
    assert not _start(tmp_path / SOCKET, worker, "0", MALLOC_TOP_PAD_="1")["forked"]


def test_without_a_server_a_worker_starts_as_ray_starts_it(
    tmp_path: Path, worker: Path
) -> None:
    assert not _start(tmp_path / SOCKET, worker, "0")["forked"]


def test_a_worker_that_nobody_waits_for_any_more_does_not_begin(
    server: subprocess.Popen[bytes], tmp_path: Path, worker: Path
) -> None:
    worker.write_text(f"open({str(tmp_path / 'began')!r}, 'w')")
    request = Request(arguments=[str(worker)], environment=_environment(), folder=str(tmp_path))
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(tmp_path / SOCKET))
        send_request(connection, request)
        pid = int(connection.recv(16))
        pidfd = os.pidfd_open(pid)
    _wait_for_end(pid, pidfd)
    os.close(pidfd)
    assert not (tmp_path / "began").exists()
    until_s = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{pid}").exists():  # the server reaps it
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_a_request_that_is_none_is_dropped_and_the_server_goes_on(
    server: subprocess.Popen[bytes], tmp_path: Path, worker: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / SOCKET))
        connection.sendall(b"nonsense")
    assert _start(tmp_path / SOCKET, worker, "0")["forked"]


def test_the_server_of_a_host_has_torch_and_ray_and_ends_with_who_started_it(
    tmp_path: Path, worker: Path
) -> None:
    worker.write_text(
        "import gc, json, sys; print(json.dumps([gc.isenabled(), sorted(sys.modules)]), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        number, path = owner.stdout.readline().decode().split()
        pid = int(number)
        pidfd = os.pidfd_open(pid)
        collects, loaded = _start(Path(path), worker)
        owner.send_signal(signal.SIGKILL)
    _wait_for_end(pid, pidfd)
    os.close(pidfd)
    assert collects  # the server does not, while it imports
    assert {"torch", "ray", "deepopt.worker.stage_worker", "deepopt.head.actor"} <= set(loaded)


def test_a_process_that_has_opened_a_gpu_is_known(tmp_path: Path) -> None:
    targets = ["/dev/null", "pipe:[7]", "/dev/nvidia0", "/dev/nvidiactl", "/home/dev/nvidia"]
    for number, target in enumerate(targets):
        (tmp_path / str(number)).symlink_to(target)
    assert open_gpus(tmp_path) == ["/dev/nvidia0", "/dev/nvidiactl"]
    assert open_gpus() == []


def test_a_folder_that_cannot_hold_a_socket_costs_the_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SOCKET_VARIABLE, "of another cluster")
    assert start_fork_server(tmp_path / "is-not-there") is None
    assert SOCKET_VARIABLE not in os.environ


def test_a_process_with_threads_is_not_served_from() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="threads run"):
            load(())
    finally:
        go_on.set()
        thread.join()


@pytest.mark.parametrize(
    "context",
    [
        {"env_vars": {"A": "1"}},
        {"command_prefix": ["nice"]},
        {"py_executable": "/usr/bin/other-python"},
    ],
)
def test_a_runtime_environment_of_its_own_is_left_to_ray(context: dict[str, Any]) -> None:
    words = ["worker.py", "--language=PYTHON"]
    assert forked_arguments([*words, "--serialized-runtime-env-context={}"]) == ["worker.py"]
    given = f"--serialized-runtime-env-context={json.dumps(context)}"
    assert forked_arguments([*words, given]) is None


def test_a_request_cut_short_is_no_request() -> None:
    one, other = socket.socketpair()
    with other:
        with one:
            send_request(one, Request(arguments=["x"], environment={}, folder="/"))
        whole, streams = receive_request(other)
        assert whole.arguments == ["x"]
        for stream in streams:
            os.close(stream)
        with pytest.raises(ValueError, match="0 bytes"):
            receive_request(other)
