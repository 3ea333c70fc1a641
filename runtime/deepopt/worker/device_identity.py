"""What a device is: its product, its host, its memory, and the versions that run on it."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deepopt.config import JobConfig

_CPU_INFO = Path("/proc/cpuinfo")
_VERSIONED = ("deepopt-cuda", "torch", "ray", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIdentity:
    """A worker's device.

    Args:
        host: host name.
        device: `cpu`, `cuda` or `emulated`.
        name: the product.
        cores: CPU cores that this process may use.
        memory_bytes: of the device; of a CPU, that of the host.
        versions: of Python and what matters for times and numbers.
    """

    host: str
    device: str
    name: str
    cores: int
    memory_bytes: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)


def identify(job: JobConfig, device: torch.device) -> DeviceIdentity:
    """What the device of this process is.

    Args:
        job: says whether it is emulated.
        device: as `choose_device` gave it.
    """
    kind = "emulated" if job.worker.device == "emulated" else device.type
    name = product_name(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        name = "emulated device" if kind == "emulated" else name
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceIdentity(
        host=socket.gethostname(),
        device=kind,
        name=name,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=int(memory),
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in _VERSIONED},
        },
    )


def product_name(device: torch.device) -> str:
    """The product that computes: of a GPU, or of this host's CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
