"""Starts the Ray processes of this host as children of the calling process, and ends them.

The only module that leans on Ray's insides: `ray.init(address="local")` and `ray start` also start
a dashboard server, a log monitor, an autoscaler and two agents a host, which cost three seconds of a start
on a small machine and which a private cluster has no use for. What runs here is the GCS (on the head host)
and the raylet. The caller adopts orphans (`process_table.become_subreaper`), so
that ending its descendants ends everything.

Ray must not have been imported before `prepare_environment`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepopt.cluster import forked_worker
from deepopt.errors import ClusterError

# A socket's path has at most 107 bytes on Linux; Ray puts 73 of its own behind the temp folder.
LONGEST_TEMP_PATH = 107 - 73
TEMP_PREFIX = "deepopt-"
REMOVE_TIMEOUT_S = 5.0  # for others to stop writing into it
_REMOVE_POLL_S = 0.02
LOOPBACK = "127.0.0.1"
MIB = 1 << 20

# What a private Ray watches ten times a second by itself, and nobody here asks for: statistics of
# its event loops and tasks, load of hosts for an autoscaler, disks and garbage of an object store
# that holds next to nothing. The workers have the cores for themselves; what a user has set stands.
_QUIET = {
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_timeline": "0",
    "RAY_task_events_report_interval_ms": "0",  # off
    "RAY_io_context_monitor_probe_interval_ms": "60000",
    "RAY_local_fs_monitor_interval_ms": "10000",
    "RAY_memory_monitor_refresh_ms": "1000",
    "RAY_object_manager_timer_freq_ms": "10000",
    "RAY_raylet_check_gc_period_milliseconds": "10000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
}

# glibc gives freed memory back to the kernel and asks for it again in every step: some thousand page
# faults a step on CPU workers of a small model. With these, next to none; tensors above 64 MiB are
# mapped one by one as before. And it leaves memory in pages of 4 KiB where the kernel gives larger ones
# only to who asks (transparent_hugepage `madvise`): asked for, forward and backward of a small model take
# 2 to 9 % less CPU time, and no more memory (benchmarks/results).
_KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

# What a raylet starts beside itself, and the ports that it waits to be told of: one samples its host
# for a dashboard, one builds environments of workers that ask for some.
ENVIRONMENTS = "runtime_env_agent"
AGENTS = {
    "dashboard_agent": (
        "metrics_agent_port",
        "metrics_export_port",
        "dashboard_agent_listen_port",
    ),
    ENVIRONMENTS: ("runtime_env_agent_port",),
}
# A shell, because the raylet adds options of its own, which it ignores.
IDLE_AGENT = '/bin/sh -c "exec sleep infinity" idle-agent'
NO_PORT = -1  # as an agent of Ray's says it

# Settings of another Ray that a private one must not take over.
_FOREIGN = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_NAMESPACE",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_TMPDIR",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRequest:
    """What the Ray processes of one host are started with.

    Args:
        node_ip: address of this host that the others reach it by; they listen there alone.
        gcs_address: of the head host; None: this is the head host.
        slots: workers that this host may hold.
        use_gpus: whether a worker takes a GPU; otherwise it takes a CPU slot.
        temp_dir: short folder of this cluster alone.
        object_store_bytes: shared memory for Ray's objects.
        is_shared: whether others may join it, with environments of their own for their workers.
    """

    node_ip: str
    gcs_address: str | None
    slots: int
    use_gpus: bool
    temp_dir: str
    object_store_bytes: int
    is_shared: bool = False


def make_temp_dir() -> Path:
    """A new folder with a path short enough for Ray's sockets.

    Raises:
        ClusterError: there is none.
    """
    roots = [Path(tempfile.gettempdir()), Path("/tmp")]
    for root in roots:
        # mkdtemp adds eight characters
        if len(str(root)) + 1 + len(TEMP_PREFIX) + 8 <= LONGEST_TEMP_PATH and root.is_dir():
            return Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=root))
    raise ClusterError(
        f"no short folder for temporary files: {', '.join(map(str, roots))}",
        remedy=f"set TMPDIR to a folder of at most {LONGEST_TEMP_PATH - 17} characters",
    )


def prepare_environment(*, threads: int, token: str, loopback: bool) -> None:
    """Set this process's environment for a private Ray; its processes inherit it.

    Args:
        threads: CPU threads of a worker, for libraries that read OMP_NUM_THREADS when they load.
        token: secret that all processes of the cluster share.
        loopback: whether the cluster is this host alone.
    """
    for name in _FOREIGN:
        os.environ.pop(name, None)
    for name, value in (_QUIET | _KEEP_MEMORY).items():
        os.environ.setdefault(name, value)
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=token,
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # Ray's default is 15: training would yield to everything
    )
    if loopback:
        # Without it Ray replaces 127.0.0.1 by an address that others can reach.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def make_token() -> str:
    """A new secret."""
    return secrets.token_hex(32)


def start_node(request: NodeRequest) -> Any:
    """Start the Ray processes of this host.

    Args:
        request: what with.

    Returns:
        Ray's own node; its `gcs_address` and `node_id` are of interest.

    Raises:
        ClusterError: Ray is missing or did not start.
    """
    try:
        from ray._private.node import Node
        from ray._private.parameter import RayParams
    except ImportError as error:
        raise ClusterError(
            f"Ray cannot be imported: {error}",
            remedy="install it with `pip install ray`, or install deepopt anew",
        ) from error
    make_params: Any = RayParams  # annotated with the strings of the command line
    params = make_params(
        gcs_address=request.gcs_address,
        node_ip_address=request.node_ip,
        # One more for the head: Ray starts so many processes ahead of the first actors.
        num_cpus=request.slots + (request.gcs_address is None),
        num_gpus=request.slots if request.use_gpus else 0,
        object_store_memory=request.object_store_bytes,
        temp_dir=request.temp_dir,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        setup_worker_path=forked_worker.__file__,
    )
    try:
        return _lean(Node, is_shared=request.is_shared)(
            params,
            head=request.gcs_address is None,
            shutdown_at_exit=False,
            spawn_reaper=True,  # the kernel kills them when this process's main thread ends
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ClusterError(
            f"Ray did not start on {request.node_ip}: {reason}",
            remedy="look at supervisor.log; free memory, disk or ports, or use another address",
        ) from error


def _lean(node: Any, *, is_shared: bool) -> Any:
    """Ray's class of a node, without processes that a private cluster has no use for."""

    class LeanNode(node):  # type: ignore[misc]
        def start_api_server(self, **_: Any) -> None:
            """Nobody asks it anything; it would take a second of a start."""

        def start_raylet(self, *arguments: Any, **options: Any) -> None:
            """Start the raylet without its agents, which take more CPU time than a worker."""
            from ray._private import services

            start = services.start_ray_process
            names = [name for name in AGENTS if not (is_shared and name == ENVIRONMENTS)]
            services.start_ray_process = lambda command, *others, **more: start(
                without_agents(command, names=names), *others, **more
            )
            try:
                super().start_raylet(*arguments, **options)
            finally:
                services.start_ray_process = start
            _tell_ports_of_agents(self, names)

    return LeanNode


def without_agents(command: Sequence[str], *, names: Sequence[str]) -> list[str]:
    """The command of a raylet with agents that do nothing: it ends where one of them does.

    Args:
        command: program and arguments.
        names: of the agents.
    """
    options = tuple(f"--{name}_command=" for name in names)
    return [
        f"{word.partition('=')[0]}={IDLE_AGENT}" if word.startswith(options) else word
        for word in command
    ]


def _tell_ports_of_agents(node: Any, names: Sequence[str]) -> None:
    """Say, where the raylet waits for it, that the agents listen nowhere."""
    from ray import _raylet

    persist_port: Any = _raylet.persist_port  # type: ignore[attr-defined]
    for name in names:
        for port in AGENTS[name]:
            persist_port(node.get_session_dir_path(), node.node_id, port, NO_PORT)


def remove_temp_dir(path: Path, *, timeout_s: float = REMOVE_TIMEOUT_S) -> bool:
    """Remove the folder that `make_temp_dir` made, and nothing else.

    Again and again: a process of Ray that is about to end may put a file into what is being removed.

    Args:
        path: the folder.
        timeout_s: how long at most.

    Returns:
        Whether it is gone, or is none of ours.
    """
    if not path.name.startswith(TEMP_PREFIX):
        return True
    until_s = time.monotonic() + timeout_s
    while True:
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return True
        if time.monotonic() > until_s:
            return False
        time.sleep(_REMOVE_POLL_S)
