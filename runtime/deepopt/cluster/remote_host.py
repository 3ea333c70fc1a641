"""What runs on a further host of a hostfile: `up` leaves a keeper behind, `down` ends it.

The keeper owns the Ray processes of its host: it adopts whatever they leave, ends with them (Ray
ends by itself when the head host is gone), and removes their folder. Requests come over stdin as
one JSON object; the answer is one JSON line on stdout. `down` loads no Ray.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from deepopt.cluster import ray_node
from deepopt.cluster.fork_server import start_fork_server
from deepopt.cluster.last_will import LastWill
from deepopt.cluster.process_table import (
    Process,
    become_subreaper,
    kill_descendants,
    this_process,
    wait_until_gone,
)
from deepopt.errors import ClusterError

POLL_S = 0.5  # between two looks whether Ray still runs
KILL_TIMEOUT_S = 15.0  # for killed processes to be gone
LOG_NAME = "keeper.log"


def up(request: dict[str, Any]) -> dict[str, Any]:
    """Start Ray under a keeper that outlives this process.

    Args:
        request: fields of `ray_node.NodeRequest`, `threads`, `token`, `python_path`, `timeout_s`.

    Returns:
        `node_id` and `keeper` (pid, start time).

    Raises:
        ClusterError: Ray does not start, or not in time.
    """
    timeout_s = float(request.pop("timeout_s"))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _keep(request, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        answer = pipe.readline()
    if not answer:
        raise ClusterError(f"Ray did not start within {timeout_s:g} s")
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        raise ClusterError(found["error"])
    return found


def down(request: dict[str, Any]) -> dict[str, Any]:
    """End a keeper, and with it all that it owns.

    Args:
        request: `pid` and `start_time` of the keeper, `timeout_s`.

    Returns:
        `gone` and `pid`.
    """
    keeper = Process(request["pid"], request["start_time"])
    keeper.send(signal.SIGTERM)
    left = wait_until_gone([keeper], timeout_s=float(request["timeout_s"]))
    return {"gone": not left, "pid": keeper.pid}


def _keep(request: dict[str, Any], writer: int) -> None:
    """The keeper's life; does not return."""
    code = 1
    temp_dir = Path(request["temp_dir"])
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, _raise_exit)
        become_subreaper()
        temp_dir.mkdir(mode=0o700, exist_ok=True)
        _redirect(temp_dir / LOG_NAME)
        # Only now: ssh would wait for a will that holds its streams, and so would the head.
        LastWill().add_folder(temp_dir)
        ray_node.prepare_environment(
            threads=request.pop("threads"), token=request.pop("token"), loopback=False
        )
        if python_path := request.pop("python_path"):
            os.environ["PYTHONPATH"] = python_path
        start_fork_server(temp_dir)
        try:
            node = ray_node.start_node(ray_node.NodeRequest(**request))
        except ClusterError as error:
            _answer(writer, {"error": error.message})
            return
        own = this_process()
        keeper = {"pid": own.pid, "start_time": own.start_time}
        _answer(writer, {"node_id": node.node_id, "keeper": keeper})
        while not node.dead_processes():
            time.sleep(POLL_S)
        code = 0
    except SystemExit:
        code = 0
    finally:
        kill_descendants(timeout_s=KILL_TIMEOUT_S)
        ray_node.remove_temp_dir(temp_dir)
        os._exit(code)


def _raise_exit(*_: object) -> None:
    raise SystemExit


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)  # ssh ends when nobody holds its streams any more
    os.close(descriptor)
    os.close(null)


def _answer(writer: int, content: dict[str, Any]) -> None:
    os.write(writer, json.dumps(content).encode() + b"\n")
    os.close(writer)


def main() -> None:
    """The process's entry."""
    verb = {"up": up, "down": down}[sys.argv[1]]
    try:
        answer = verb(json.load(sys.stdin))
    except ClusterError as error:
        sys.exit(error.message)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
