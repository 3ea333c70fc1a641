"""What of a job computes in FP8, in words."""

from __future__ import annotations

from deepopt.config import JobConfig
from deepopt.planner.skeleton import ModelSkeleton


def fp8_words(job: JobConfig, skeleton: ModelSkeleton) -> str | None:
    """Which linear maps compute in FP8 and which do not; None where none does.

    Args:
        job: says where it runs.
        skeleton: of its model.
    """
    count = skeleton.num_fp8
    if not count:
        return None
    from deepopt.convert.fp8_linears import grouped

    left = skeleton.not_fp8
    held = sum(p.numel for layer in skeleton.layers for p in layer.parameters if p.fp8)
    share = 100 * held / skeleton.num_parameters
    parts = [
        f"{count} linear maps with {share:.0f} % of the parameters, a scale each 128 values or "
        "128 x 128 block"
    ]
    if left:
        parts.append(f"{len(left)} stay in {job.precision.dtype}: {', '.join(grouped(left))}")
    if _runs_on_cpus(job):
        parts.append(
            "on CPUs computed by the PyTorch reference: right, but slower than without"
        )
    return "; ".join(parts)


def _runs_on_cpus(job: JobConfig) -> bool:
    if job.worker.device != "auto":
        return job.worker.device == "cpu"
    if job.cluster.hostfile is not None or job.cluster.address is not None:
        return False  # other machines: not known here
    import torch

    return not torch.cuda.is_available()
