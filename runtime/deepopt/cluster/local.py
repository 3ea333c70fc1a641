"""A private Ray on this machine, for one job: own temporary folder, free ports, loopback only."""

from __future__ import annotations

from pathlib import Path

from deepopt.cluster import ray_node
from deepopt.cluster.fork_server import start_fork_server
from deepopt.cluster.process_table import kill_descendants
from deepopt.cluster.slots import Slot, Slots, check_slots
from deepopt.errors import ClusterError

KILL_TIMEOUT_S = 15.0  # for killed processes to be gone


class LocalCluster:
    """A private Ray; the calling process owns it and must have become a subreaper.

    Args:
        num_workers: workers that it shall hold.
        device: `worker.device` of the job; `auto` takes GPUs where there are any.
        threads: CPU threads of a worker.
        object_store_mb: shared memory for Ray's objects, in MiB.
        namespace: Ray namespace of the job.
        temp_dir: folder from `ray_node.make_temp_dir`; removed at the end.

    Raises:
        ClusterError: Ray does not start, or there are not enough GPUs.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        device: str,
        threads: int,
        object_store_mb: int,
        namespace: str,
        temp_dir: Path,
    ) -> None:
        self._temp_dir = temp_dir
        self.node_ip = ray_node.LOOPBACK
        ray_node.prepare_environment(
            threads=threads, token=ray_node.make_token(), loopback=True
        )
        start_fork_server(temp_dir)  # first of all: it takes longest
        num_gpus = count_gpus() if device in ("auto", "cuda") else 0
        use_gpus = device == "cuda" or num_gpus > 0
        if use_gpus:
            check_slots(wanted=num_workers, found={"this host": num_gpus}, what="GPUs")
        node = ray_node.start_node(
            ray_node.NodeRequest(
                node_ip=ray_node.LOOPBACK,
                gcs_address=None,
                slots=num_workers,
                use_gpus=use_gpus,
                temp_dir=str(temp_dir),
                object_store_bytes=object_store_mb * ray_node.MIB,
            )
        )
        connect(node.gcs_address, namespace=namespace)
        self.slots = Slots(
            places=(Slot(host="this host"),) * num_workers,
            use_gpus=use_gpus,
            head_node_id=node.node_id,
        )

    def close(self) -> list[str]:
        """End all processes and remove the folder.

        Returns:
            What could not be removed; empty as a rule.
        """
        disconnect()
        return close_own_ray(self._temp_dir)


def connect(address: str, *, namespace: str) -> None:
    """Make the calling process a driver of a cluster.

    Args:
        address: of the cluster.
        namespace: Ray namespace of the job.

    Raises:
        ClusterError: it cannot.
    """
    import ray

    try:
        ray.init(
            address=address, namespace=namespace, log_to_driver=False, configure_logging=False
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"cannot connect to Ray at {address}: {reason}",
            remedy="check that it runs (`ray status`), that this host is part of it, and that its "
            "Ray and Python versions are the same",
        ) from error


def disconnect() -> None:
    """The opposite of `connect`."""
    import ray

    ray.shutdown()


def close_own_ray(temp_dir: Path) -> list[str]:
    """End all processes below the calling one, remove Ray's folder; needs no Ray for it.

    Args:
        temp_dir: folder from `ray_node.make_temp_dir`.

    Returns:
        What could not be removed.
    """
    left = [f"process {process.pid}" for process in kill_descendants(timeout_s=KILL_TIMEOUT_S)]
    if not ray_node.remove_temp_dir(temp_dir):
        left.append(str(temp_dir))
    return left


def count_gpus() -> int:
    """GPUs of this host that this process may use, as Ray counts them."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    found = int(NvidiaGPUAcceleratorManager.get_current_node_num_accelerators())
    return found if visible is None else min(found, len(visible))
