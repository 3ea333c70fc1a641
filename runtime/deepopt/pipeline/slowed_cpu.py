"""A CPU worker that is slower than it could be: `emulation.rank_factor` on workers that are real.

After each operation the thread computes on until it has used so many times the CPU time of the operation,
so it takes its core from others for as long as a slower processor would. Numbers do not change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.spans import SpanRecorder
from deepopt.schedule.ir import COMPUTE_OPS, Action


def slow_factor(job: JobConfig, *, pipeline_rank: int, device: torch.device) -> float:
    """How many times as long a real worker shall take for its work; 1 where the job asks for nothing.

    Args:
        job: the resolved job.
        pipeline_rank: of the worker.
        device: of the worker.
    """
    factors = job.emulation.rank_factor
    if not factors or device.type != "cpu" or job.worker.device == "emulated":
        return 1.0
    return factors[pipeline_rank] if pipeline_rank < len(factors) else 1.0


def use_up(since_ns: int, *, factor: float) -> None:
    """Compute until the work since a moment has taken `factor` times its CPU time.

    Args:
        since_ns: of `time.thread_time_ns`, of this thread.
        factor: at least 1.
    """
    until_ns = since_ns + round((time.thread_time_ns() - since_ns) * factor)
    while time.thread_time_ns() < until_ns:
        pass


class SlowedCpu(SpanRecorder):
    """Records spans, and makes each compute action take `factor` times its CPU time.

    Args:
        factor: above 1.
    """

    def __init__(self, factor: float) -> None:
        super().__init__(torch.device("cpu"))
        self._factor = factor

    def end(self, action: Action) -> None:
        """The work of the action that began last is done: use up what a slower processor would."""
        if action.op in COMPUTE_OPS:
            use_up(self._begun[1], factor=self._factor)
        super().end(action)

    @contextmanager
    def updates(self) -> Iterator[None]:
        """What is done inside takes `factor` times its CPU time."""
        began_ns = time.thread_time_ns()
        yield
        use_up(began_ns, factor=self._factor)
