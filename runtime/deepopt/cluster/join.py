"""Takes part in a Ray cluster that runs already and that others use too.

The job reserves its places as one placement group, so that it starts whole or not at all. At the
end its actors and its reservation go; everything else stays as it was.
"""

from __future__ import annotations

from typing import Any

from deepopt.cluster.local import connect
from deepopt.cluster.slots import Slot, Slots
from deepopt.errors import ClusterError


class JoinedCluster:
    """A cluster of somebody else.

    Args:
        address: `host:port` of its GCS, or `auto` for one on this host.
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
        if address.startswith("ray://"):
            raise ClusterError(
                f"{address} is an address of Ray Client, which cannot carry a job",
                remedy="give the cluster's own address, HOST:6379, on a host of the cluster",
            )
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
        ray = _import_ray()
        group = getattr(self, "_group", None)
        if group is not None and ray.is_initialized():
            ray.util.remove_placement_group(group)
        ray.shutdown()
        return []


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
    hosts = {
        node["NodeManagerAddress"]: int(node["Resources"].get(key, 0))
        for node in ray.nodes()
        if node["Alive"]
    }
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
