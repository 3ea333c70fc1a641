"""The transport of a process group that the user's script has formed: it is used, never ended."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from deepopt.errors import InputError
from deepopt.pipeline.process_group import ProcessGroupTransport
from deepopt.pipeline.transport import Store

_REMEDY = (
    'call torch.distributed.init_process_group("gloo") for CPUs, "cpu:gloo,cuda:nccl" for GPUs'
)


class GivenGroupTransport(ProcessGroupTransport):
    """Over the default process group; its timeout is the group's.

    Args:
        device: where tensors live; `cuda` means NCCL.

    Raises:
        InputError: the group does not serve the device.
    """

    def __init__(self, *, device: torch.device) -> None:
        backends = dist.get_backend_config()
        wanted = ["cpu:gloo", "cuda:nccl"] if device.type == "cuda" else ["cpu:gloo"]
        if any(backend not in backends for backend in wanted):
            raise InputError(
                f"the process group has the backends {backends}, layers on {device.type} need "
                f"{' and '.join(wanted)}",
                remedy=_REMEDY,
            )
        group_timeout = dist.distributed_c10d._get_default_timeout(dist.Backend("gloo"))
        super().__init__(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            timeout_s=group_timeout.total_seconds(),
            form_timeout_s=group_timeout.total_seconds(),
        )
        # Pipelines are made in one order on all ranks, like groups: the number keeps them apart.
        store: Store = dist.distributed_c10d._get_default_store()
        number = store.add(f"deepopt/pipelines/{dist.get_rank()}", 1)
        self._store = PrefixStore(f"deepopt/pipeline/{number}", store)
