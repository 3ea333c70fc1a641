"""Takes part in a Ray cluster that runs already and that others use too.

The job reserves its places as one placement group, so that it starts whole or not at all. At the
end its actors and its reservation go; everything else stays as it was.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

from deepopt.cluster.local import connect
from deepopt.cluster.slots import Slot, Slots
from deepopt.errors import ClusterError

KNOCK_TIMEOUT_S = 10.0  # for the cluster's host to accept a connection


class JoinedCluster:
    """A cluster of somebody else.

    Args:
        address: `HOST:PORT` of its GCS.
        num_workers: places to reserve.
        device: `worker.device` of the job; `auto` takes GPUs where there are any.
        threads: CPU threads of a worker.
        namespace: Ray namespace of the job.
        python_path: PYTHONPATH for the workers; empty for none.
        timeout_s: how long to wait for the places, `cluster.start_timeout_s`.

    Raises:
        ClusterError: no cluster there, or not enough room in it.
    """

    def __init__(
        self,
        *,
        address: str,
        num_workers: int,
        device: str,
        threads: int,
        namespace: str,
        python_path: str,
        timeout_s: float,
    ) -> None:
        check_reachable(address)
        connect(address, namespace=namespace)
        try:
            ray = _import_ray()
            use_gpus = device == "cuda" or (
                device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
            )
            self._group = reserve(num_workers, use_gpus=use_gpus, timeout_s=timeout_s)
            context = ray.get_runtime_context()
            self.node_ip = ray.util.get_node_ip_address()
            self.slots = Slots(
                places=tuple(
                    Slot(host=address, bundle_index=index) for index in range(num_workers)
                ),
                use_gpus=use_gpus,
                head_node_id=context.get_node_id(),
                placement_group=self._group,
                worker_environment={
                    "OMP_NUM_THREADS": str(threads),
                    **({"PYTHONPATH": python_path} if python_path else {}),
                },
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> list[str]:
        """Give the places back and disconnect; the job's actors end with that."""
        from deepopt.cluster.node_agents import end_detached

        ray = _import_ray()
        group = getattr(self, "_group", None)
        if ray.is_initialized():
            end_detached()
        if group is not None and ray.is_initialized():
            ray.util.remove_placement_group(group)
        ray.shutdown()
        return []


def check_reachable(address: str) -> None:
    """Knock at a cluster's door; Ray itself would try for minutes, deaf to signals.

    Args:
        address: `HOST:PORT`.

    Raises:
        ClusterError: it is no such address, or nobody answers.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ClusterError(
            f"cluster.address {address} is not HOST:PORT",
            remedy="give the address of the cluster's GCS, as `ray start --head` prints it, for "
            "example 10.0.0.5:6379, on a host of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray answers at {address}: {error}",
            remedy="check the address and that the cluster runs: `ray status` on its head host",
        ) from error


def reserve(num_workers: int, *, use_gpus: bool, timeout_s: float) -> Any:
    """Reserve places for all workers at once, on as few hosts as possible.

    Args:
        num_workers: places.
        use_gpus: whether a place is a GPU; otherwise a CPU slot.
        timeout_s: how long to wait.

    Raises:
        ClusterError: there is no room.
    """
    ray = _import_ray()
    key = "GPU" if use_gpus else "CPU"
    what = "GPUs" if use_gpus else "CPU slots"
    hosts: Counter[str] = Counter()  # one may have several of Ray's nodes
    for node in ray.nodes():
        if node["Alive"]:
            hosts[node["NodeManagerAddress"]] += int(node["Resources"].get(key, 0))
    total = sum(hosts.values())
    shown = ", ".join(f"{host}: {slots}" for host, slots in hosts.items())
    if total < num_workers:
        raise ClusterError(
            f"asked for {num_workers} workers, found {total} {what} on {len(hosts)} host(s) of "
            f"the cluster ({shown})",
            remedy="lower --workers, or add hosts to the cluster",
        )
    group = ray.util.placement_group([{key: 1}] * num_workers, strategy="PACK")
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        free = int(ray.available_resources().get(key, 0))
        raise ClusterError(
            f"asked for {num_workers} workers, found {free} of {total} {what} free on "
            f"{len(hosts)} host(s) of the cluster ({shown}) after {timeout_s:g} s",
            remedy="lower --workers, wait for other jobs, or raise cluster.start_timeout_s",
        )
    return group


def _import_ray() -> Any:
    import ray

    return ray  # its annotations are half there, and wrong where they are
