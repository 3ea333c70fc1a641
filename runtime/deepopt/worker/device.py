"""The device of a worker, and how many floating-point operations a second it could do at
best."""

from __future__ import annotations

import os
import statistics
import time

import torch

from deepopt.config import JobConfig
from deepopt.errors import DeviceError, InputError
from deepopt.telemetry.flops import device_peak_flops

_PROBE_SIZE = 512  # elements a side: 0.27 GFLOP, about 10 ms on one CPU core
_PROBES = 5


# What the driver says of a device that is gone or broken, or of itself. An illegal access or a failed
# assertion is not among them: that is the model's code, and it would do the same elsewhere.
_DEVICE_IS_LOST = (
    "no cuda gpus are available",
    "no cuda-capable device is detected",
    "cuda-capable device(s) is/are busy or unavailable",
    "cuda driver initialization failed",
    "cuda unknown error",
    "driver shutting down",
    "invalid device ordinal",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "hardware stack error",
    "system not yet initialized",
    "system has unsupported display driver / cuda driver combination",
)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the device is gone or broken, so that the work can go on elsewhere.

    Args:
        error: of a worker; its causes are looked at as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DeviceError):
            return True
        said = str(seen).lower()
        if isinstance(seen, RuntimeError) and any(words in said for words in _DEVICE_IS_LOST):
            return True
        seen = seen.__cause__
    return False


def pin_gpu(job: JobConfig, *, rank: int) -> None:
    """Let this process see the GPU that the job names for its rank; before CUDA is used.

    Args:
        job: `worker.gpus` may name them.
        rank: of this worker, in the world.

    Raises:
        InputError: there are more workers than named GPUs.
    """
    gpus = job.worker.gpus
    if not gpus:
        return
    if rank >= len(gpus):
        raise InputError(
            f"worker.gpus names {len(gpus)} GPU(s), and there is a rank {rank}",
            remedy="name one for each worker, or none",
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[rank]


def choose_device(job: JobConfig) -> torch.device:
    """The device of this process: the GPU that the cluster made visible to it, or the CPU.

    Raises:
        DeviceError: the job wants CUDA and there is none here.
    """
    wanted = job.worker.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise DeviceError(
            "worker.device is cuda, but torch sees no GPU in the worker's process",
            remedy="check the driver and torch's CUDA build, or set worker.device to cpu",
        )
    if wanted in ("cpu", "emulated") or not available:
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def peak_flops(job: JobConfig, device: torch.device) -> tuple[float, str]:
    """The device's peak in FLOP/s and where the figure comes from.

    Args:
        job: `logging.peak_flops` comes first.
        device: a GPU is looked up by its name; a CPU is measured.

    Returns:
        (FLOP/s, `job`, `table`, `measured`, or 0 and `emulated`). Measured: the best rate of a square matrix
        product, so utilisation relative to it is that of the code, not of the data sheet.
    """
    if job.logging.peak_flops is not None:
        return job.logging.peak_flops, "job"
    if job.worker.device == "emulated":
        return 0.0, "emulated"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = device_peak_flops(name, job.precision.dtype)
        if known is not None:
            return known, "table"
    dtype = torch.bfloat16 if job.precision.dtype == "bfloat16" else torch.float32
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2.0 * _PROBE_SIZE**3 / statistics.median(times), "measured"
