"""Which cluster a job runs in: a private one here, one over ssh, or one that runs already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deepopt.cluster import ray_node
from deepopt.config import JobConfig

if TYPE_CHECKING:
    from deepopt.cluster.join import JoinedCluster
    from deepopt.cluster.local import LocalCluster
    from deepopt.cluster.ssh import SshCluster


def start_cluster(
    job: JobConfig,
    *,
    num_workers: int,
    namespace: str,
    python_path: str,
    note: Callable[[Path | None], None],
) -> LocalCluster | SshCluster | JoinedCluster:
    """Start or join the cluster that a job asks for.

    Args:
        job: the resolved job.
        num_workers: workers that it shall hold.
        namespace: Ray namespace of the job.
        python_path: PYTHONPATH of the calling process, for workers that do not inherit it.
        note: told the folder of a cluster of our own before it is used.

    Raises:
        DeepoptError: it cannot, with the reason and the next step.
    """
    if job.cluster.address is not None:
        from deepopt.cluster.join import JoinedCluster

        return JoinedCluster(
            address=job.cluster.address,
            num_workers=num_workers,
            device=job.worker.device,
            threads=job.worker.threads,
            namespace=namespace,
            python_path=python_path,
            timeout_s=job.cluster.start_timeout_s,
        )
    temp_dir = ray_node.make_temp_dir()
    note(temp_dir)
    if job.cluster.hostfile is not None:
        from deepopt.cluster.hostfile import read_hostfile
        from deepopt.cluster.ssh import SshCluster

        return SshCluster(
            hosts=read_hostfile(Path(job.cluster.hostfile)),
            num_workers=num_workers,
            device=job.worker.device,
            threads=job.worker.threads,
            object_store_mb=job.cluster.object_store_mb,
            namespace=namespace,
            python_path=python_path,
            temp_dir=temp_dir,
            timeout_s=job.cluster.start_timeout_s,
        )
    from deepopt.cluster.local import LocalCluster

    return LocalCluster(
        num_workers=num_workers,
        device=job.worker.device,
        threads=job.worker.threads,
        object_store_mb=job.cluster.object_store_mb,
        namespace=namespace,
        temp_dir=temp_dir,
    )
