"""A Ray of our own on several hosts, brought up over the user's own ssh, one cluster a job.

The head host is the calling one, whether it holds workers or not. On every other host of the
hostfile a keeper (`cluster.remote_host`) owns the Ray processes: it is started over ssh and stays
when ssh goes, so a moment of lost ssh harms nothing. Ray's secret goes over ssh's stdin.
"""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepopt.cluster import ray_node
from deepopt.cluster.fork_server import start_fork_server
from deepopt.cluster.hostfile import Host
from deepopt.cluster.local import close_own_ray, connect, count_gpus, disconnect
from deepopt.cluster.slots import Slot, Slots, check_slots
from deepopt.errors import ClusterError

CONNECT_TIMEOUT_S = 15  # of ssh
STOP_TIMEOUT_S = 30.0  # for a keeper to end its processes
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachedHost:
    """A host whose Ray is up.

    Args:
        host: as in the hostfile.
        node_id: Ray's id of it.
        keeper: what `down` needs: pid and start time; None for the calling host.
    """

    host: Host
    node_id: str
    keeper: dict[str, Any] | None


class SshCluster:
    """A private Ray on the hosts of a hostfile.

    Args:
        hosts: of the hostfile, in order; ranks fill them in this order.
        num_workers: workers that it shall hold.
        device: `worker.device` of the job; `auto` takes GPUs where this host has any.
        threads: CPU threads of a worker.
        object_store_mb: shared memory for Ray's objects on each host, in MiB.
        namespace: Ray namespace of the job.
        python_path: PYTHONPATH for the workers; empty for none.
        temp_dir: folder from `ray_node.make_temp_dir`; each host gets one of this name.
        timeout_s: for each host to come up, `cluster.start_timeout_s`.

    Raises:
        ClusterError: too few slots, or a host does not come up; nothing is left running.
    """

    def __init__(
        self,
        *,
        hosts: Sequence[Host],
        num_workers: int,
        device: str,
        threads: int,
        object_store_mb: int,
        namespace: str,
        python_path: str,
        temp_dir: Path,
        timeout_s: float,
    ) -> None:
        self._temp_dir = temp_dir
        self._reached: list[ReachedHost] = []
        self._connected = False
        used = take_slots(hosts, num_workers=num_workers)
        addresses = {host.name: resolve(host) for host in used}
        here = [host for host in used if is_local(addresses[host.name])]
        others = [host for host in used if host not in here]
        token = ray_node.make_token()
        # Before anything imports Ray, which reads it once.
        ray_node.prepare_environment(threads=threads, token=token, loopback=not others)
        start_fork_server(temp_dir)
        use_gpus = device == "cuda" or (device == "auto" and count_gpus() > 0)
        check_slots(
            wanted=num_workers,
            found={host.name: host.slots for host in hosts},
            what="GPUs" if use_gpus else "CPU slots",
        )
        if len(here) > 1:
            raise ClusterError(
                f"the hostfile names this host twice: {', '.join(host.name for host in here)}",
                remedy="give each host one line with all of its slots",
            )
        self.node_ip = head_address(
            here=[addresses[host.name] for host in here],
            others=[addresses[host.name] for host in others],
        )
        node = ray_node.start_node(
            ray_node.NodeRequest(
                node_ip=self.node_ip,
                gcs_address=None,
                slots=here[0].slots if here else 0,
                use_gpus=use_gpus,
                temp_dir=str(temp_dir),
                object_store_bytes=object_store_mb * ray_node.MIB,
            )
        )
        self._reached += [
            ReachedHost(host=host, node_id=node.node_id, keeper=None) for host in here
        ]
        try:
            self._bring_up(
                others,
                addresses=addresses,
                common={
                    "gcs_address": node.gcs_address,
                    "use_gpus": use_gpus,
                    "temp_dir": str(temp_dir),
                    "object_store_bytes": object_store_mb * ray_node.MIB,
                    "threads": threads,
                    "token": token,
                    "python_path": python_path,
                },
                timeout_s=timeout_s,
            )
            connect(node.gcs_address, namespace=namespace)
            self._connected = True
        except BaseException:
            self.close()
            raise
        node_ids = {reached.host.name: reached.node_id for reached in self._reached}
        places = [
            Slot(host=host.name, node_id=node_ids[host.name])
            for host in used
            for _ in range(host.slots)
        ]
        self.slots = Slots(
            places=tuple(places[:num_workers]),
            use_gpus=use_gpus,
            head_node_id=node.node_id,
        )

    def close(self) -> list[str]:
        """End all processes on all hosts and remove their folders.

        Returns:
            What could not be removed.
        """
        keepers = [reached for reached in self._reached if reached.keeper is not None]
        left: list[str] = []
        with ThreadPoolExecutor(max_workers=max(1, len(keepers))) as pool:
            for found in pool.map(_take_down, keepers):
                left += found
        self._reached = []
        if self._connected:
            disconnect()
        return left + close_own_ray(self._temp_dir)

    def _bring_up(
        self,
        hosts: Sequence[Host],
        *,
        addresses: dict[str, str],
        common: dict[str, Any],
        timeout_s: float,
    ) -> None:
        def bring_up(host: Host) -> ReachedHost | ClusterError:
            request = {"node_ip": addresses[host.name], "slots": host.slots, **common}
            try:
                answer = run_remote(host, "up", request=request, timeout_s=timeout_s)
            except ClusterError as error:
                return error
            return ReachedHost(host=host, node_id=answer["node_id"], keeper=answer["keeper"])

        with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
            outcomes = list(pool.map(bring_up, hosts))
        self._reached += [found for found in outcomes if isinstance(found, ReachedHost)]
        for outcome in outcomes:
            if isinstance(outcome, ClusterError):
                raise outcome


def take_slots(hosts: Sequence[Host], *, num_workers: int) -> tuple[Host, ...]:
    """The hosts that are needed, in order; all of them where they have too few slots.

    Args:
        hosts: of the hostfile.
        num_workers: workers to place.
    """
    used: list[Host] = []
    for host in hosts:
        if sum(taken.slots for taken in used) >= num_workers:
            break
        used.append(host)
    return tuple(used)


def ssh_command(host: Host, *, command: Sequence[str]) -> list[str]:
    """The command line that runs a command on a host.

    Args:
        host: where.
        command: program and arguments.
    """
    port = [] if host.port is None else ["-p", str(host.port)]
    return [*_SSH, *port, host.name, shlex.join(command)]


def run_remote(
    host: Host, verb: str, *, request: dict[str, Any], timeout_s: float
) -> dict[str, Any]:
    """Run `cluster.remote_host` on a host with this process's own Python.

    Args:
        host: where.
        verb: `up` or `down`.
        request: goes over stdin, so that no secret is seen in a list of processes.
        timeout_s: how long it may take.

    Raises:
        ClusterError: ssh or the host failed; has the host and the last line of what it said.
    """
    command = [sys.executable, "-m", "deepopt.cluster.remote_host", verb]
    try:
        done = subprocess.run(
            ssh_command(host, command=command),
            input=json.dumps({**request, "timeout_s": timeout_s}),
            capture_output=True,
            text=True,
            timeout=timeout_s + CONNECT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(
            "there is no ssh on this host", remedy="install OpenSSH's client"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"host {host.name} did not come {verb} within {error.timeout:g} s",
            remedy="raise cluster.start_timeout_s, or take the host out of the hostfile",
        ) from error
    answer = _last_json(done.stdout)
    if done.returncode == 0 and answer is not None:
        return answer
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    if done.returncode == 255:  # ssh's own
        raise ClusterError(
            f"ssh to host {host.name} failed: {last}",
            remedy=f"check that `ssh -o BatchMode=yes {host.name} true` works without a password",
        )
    raise ClusterError(
        f"Ray did not come {verb} on host {host.name}: {last}",
        remedy=f"check that {sys.executable} is there with deepopt and Ray, as it is here",
    )


def resolve(host: Host) -> str:
    """The IPv4 address of a host, by ssh's configuration and the system's names.

    Raises:
        ClusterError: it has none.
    """
    name = host.name.rpartition("@")[2]
    try:
        shown = subprocess.run(
            ["ssh", "-G", host.name],
            capture_output=True,
            text=True,
            timeout=CONNECT_TIMEOUT_S,
            check=False,
        )
        for line in shown.stdout.splitlines():
            if line.startswith("hostname "):
                name = line.split()[1]
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            "ssh does not answer on this host", remedy="install OpenSSH's client"
        ) from error
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ClusterError(
            f"host {host.name} has no address: {error.strerror}",
            remedy="write its IP address into the hostfile",
        ) from error


def is_local(address: str) -> bool:
    """Whether an IPv4 address is one of this host's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def head_address(*, here: Sequence[str], others: Sequence[str]) -> str:
    """The address that this host's Ray listens at.

    Args:
        here: IPv4 address of this host, if it is in the hostfile; often a loopback one (`localhost`,
            or its own name in /etc/hosts), which no other host can reach.
        others: IPv4 addresses of the other hosts.

    Raises:
        ClusterError: there is no route to the first of the others.
    """
    if not others:
        return ray_node.LOOPBACK
    if here and not ipaddress.ip_address(here[0]).is_loopback:
        return here[0]
    return source_address(others[0])


def source_address(target: str) -> str:
    """The address of this host that a target host sees."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # sends nothing; the kernel chooses the route
        except OSError as error:
            raise ClusterError(
                f"there is no route from this host to {target}: {error.strerror}",
                remedy="check the network, or take the host out of the hostfile",
            ) from error
        return str(probe.getsockname()[0])


def _take_down(reached: ReachedHost) -> list[str]:
    assert reached.keeper is not None, "this host has no keeper"
    try:
        answer = run_remote(
            reached.host, "down", request=reached.keeper, timeout_s=STOP_TIMEOUT_S
        )
    except ClusterError as error:
        return [f"Ray on host {reached.host.name}: {error.message}"]
    return [] if answer["gone"] else [f"Ray on host {reached.host.name}: pid {answer['pid']}"]


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None
