"""Sections `worker` and `cluster`: the processes that train, and where they run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from deepopt.config_fields import Count, Seconds, Section, Text, refuse


class WorkerConfig(Section):
    """The processes that train."""

    count: Count | None = Field(
        default=None, description="Workers; null: one a GPU, or 4 where there is no GPU."
    )
    threads: Count = Field(
        default=1,
        description="CPU threads of a worker; 1 keeps the numbers independent of how many "
        "workers share the machine.",
    )
    device: Literal["auto", "cpu", "cuda", "emulated"] = Field(
        default="auto",
        description="Where tensors live; `auto`: cuda where there is a GPU; `emulated`: on the "
        "CPU, but each operation takes the time that `emulation` says.",
    )
    gpus: tuple[Text, ...] = Field(
        default=(),
        description="GPU of each rank on its host, as CUDA_VISIBLE_DEVICES names it (`0`, `GPU-...`); "
        "empty: as the cluster gives them out.",
    )


class ClusterConfig(Section):
    """Where processes run; by default a private cluster on this machine."""

    address: Text | None = Field(
        default=None, description="Address of a running Ray cluster to join; null: start one."
    )
    hostfile: Text | None = Field(
        default=None, description="File of lines `host slots=N`; the hosts are reached by ssh."
    )
    start_timeout_s: Seconds = Field(
        default=120.0, description="Longest wait for the cluster to start, in seconds."
    )
    object_store_mb: Annotated[int, Strict(), Field(ge=75)] = Field(  # Ray's own minimum
        default=80, description="Shared memory of Ray's object store on each host, in MiB."
    )

    @model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if self.address is not None and self.hostfile is not None:
            refuse(
                f"cluster.address ({self.address}) and cluster.hostfile ({self.hostfile}) "
                "are both set",
                remedy="join a running cluster by its address, or start one over a hostfile",
                fields=("hostfile", "address"),
            )
        return self
