"""Accelerators and the hosts they come in, as data: what a cluster could do at best.

Pure. Rates are the vendors' figures for one direction, dense; what part of them a training step
reaches is an argument elsewhere (`transformer_costs`). Peak FLOP/s stand in `telemetry.flops`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from deepopt.errors import PlanError
from deepopt.telemetry.flops import device_peak_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One kind of GPU in the vendor's own eight-GPU host.

    Args:
        name: as people write it.
        device_name: as `torch.cuda.get_device_name` prints it.
        memory_bytes: of one GPU.
        memory_bytes_per_s: reads and writes of that memory together.
        link_bytes_per_s: NVLink of one GPU, one direction.
        gpus_per_host: GPUs that NVLink joins.
        network_bytes_per_s: network of one GPU to other hosts, one direction.
        source: where the figures are from.
    """

    name: str
    device_name: str
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    gpus_per_host: int
    network_bytes_per_s: float
    source: str

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = device_peak_flops(self.device_name, "bfloat16")
        assert peak is not None, f"telemetry.flops lacks {self.device_name}"
        return peak


_ALL = (
    Accelerator(
        name="A100",
        device_name="NVIDIA A100-SXM4-80GB",
        memory_bytes=80e9,
        memory_bytes_per_s=2.039e12,
        link_bytes_per_s=300e9,  # 12 links x 25 GB/s; the sheet's 600 GB/s are both directions
        gpus_per_host=8,
        network_bytes_per_s=25e9,  # one ConnectX-6 a GPU: HDR InfiniBand, 200 Gb/s
        source="NVIDIA A100 80GB data sheet (SXM); DGX A100 data sheet",
    ),
    Accelerator(
        name="H100",
        device_name="NVIDIA H100 80GB HBM3",
        memory_bytes=80e9,
        memory_bytes_per_s=3.35e12,
        link_bytes_per_s=450e9,  # 18 links x 25 GB/s
        gpus_per_host=8,
        network_bytes_per_s=50e9,  # one ConnectX-7 a GPU: NDR InfiniBand, 400 Gb/s
        source="NVIDIA H100 data sheet (SXM); DGX H100 data sheet",
    ),
    Accelerator(
        name="H200",
        device_name="NVIDIA H200",
        memory_bytes=141e9,
        memory_bytes_per_s=4.8e12,
        link_bytes_per_s=450e9,
        gpus_per_host=8,
        network_bytes_per_s=50e9,
        source="NVIDIA H200 data sheet (SXM); DGX H200 data sheet",
    ),
)
ACCELERATORS: dict[str, Accelerator] = {one.name: one for one in _ALL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs of one kind, packed into hosts.

    Args:
        accelerator: the kind.
        num_gpus: in all.
    """

    accelerator: Accelerator
    num_gpus: int

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise PlanError(
                f"a cluster of {self.num_gpus} GPUs computes nothing",
                remedy="name at least one",
            )

    def host_of(self, *, num_ranks: int, gpus_per_rank: int) -> tuple[int, ...]:
        """The host of each pipeline rank's first GPU; ranks take neighbouring GPUs.

        Args:
            num_ranks: of one pipeline.
            gpus_per_rank: GPUs that work as one rank (tensor parallelism).
        """
        per_host = self.accelerator.gpus_per_host
        return tuple(rank * gpus_per_rank // per_host for rank in range(num_ranks))


_CLUSTER = re.compile(r"(\d+)\s*x\s*(\w+)", re.IGNORECASE)


def parse_cluster(text: str) -> Cluster:
    """Read `128xA100`.

    Args:
        text: number of GPUs, `x`, a key of `ACCELERATORS` in any case.

    Raises:
        PlanError: not of this form, or no such accelerator.
    """
    match = _CLUSTER.fullmatch(text.strip())
    if match is None:
        raise PlanError(
            f"{text!r} does not say how many GPUs of which kind", remedy="write 128xA100"
        )
    accelerator = ACCELERATORS.get(match[2].upper())
    if accelerator is None:
        close = difflib.get_close_matches(match[2].upper(), ACCELERATORS, n=1)
        raise PlanError(
            f"there is no table for accelerator {match[2]!r}",
            remedy=(f"did you mean {close[0]}? " if close else "")
            + f"known: {', '.join(ACCELERATORS)}",
        )
    return Cluster(accelerator=accelerator, num_gpus=int(match[1]))
