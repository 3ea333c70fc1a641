"""Processes that keep the other cores of this host as busy as other workers will.

The CPU time of an operation depends on what else runs: caches, memory and, on many processors, units of a
core are shared, and a core that several processes take turns on finds little of their data in its caches. A
layer that is tried alone takes up to a third less than in a training of as many workers. These stand
in for the others in a launch, which has none yet; a profile has the workers themselves. They need no torch,
so they are there in a moment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# As a worker does: products of matrices, some passes over a few MB, and a little Python in between. It ends
# with whoever started it.
_WORK = """
import os, sys
import numpy
parent = int(sys.argv[1])
a = numpy.random.default_rng(0).normal(size=(512, 128)).astype("float32")
b = numpy.ones((128, 256), dtype="float32")
data = numpy.zeros(1 << 19, dtype="float32")
print("ready", flush=True)
while os.getppid() == parent:
    c = numpy.maximum(a @ b, 0.0)
    numpy.exp(-c).sum()
    data += 1.0
"""


def workers_at_once(count: int, *, cores: int, threads: int) -> int:
    """How many CPU workers of a host measure at the same moment.

    A worker with one thread takes the CPU time of that thread, in which others do not count but for the
    caches and units that they use: all measure together, as they train. CPU time of an operation in 4 workers
    on 2 cores was 1.1 times that in 2, and 1.3 times that in one alone. With more threads wall time
    counts, so each has its cores.

    Args:
        count: workers of the host.
        cores: of the host.
        threads: of one worker.
    """
    return count if threads == 1 else max(1, cores // threads)


def num_companions(num_workers: int, *, threads: int, cores: int | None = None) -> int:
    """How many processes stand in for the other workers of this host: so many that cores are shared where
    workers will share them, and no more, for each makes the trial longer.

    Args:
        num_workers: of the job, all on this host.
        threads: `worker.threads`.
        cores: of this host; None: those that this process may use.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    together = min(num_workers, workers_at_once(num_workers, cores=cores, threads=threads))
    return max(0, min(together, cores + 1) - 1)


@contextmanager
def company(count: int) -> Iterator[tuple[subprocess.Popen[str], ...]]:
    """Processes that compute as workers do, until the end of the block.

    Args:
        count: of them.

    Yields:
        The processes; those that could not start are missing.
    """
    one_thread = {
        name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", _WORK, str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **one_thread},
            )
            started.append(process)
        busy = [process for process in started if process.stdout and process.stdout.readline()]
        yield tuple(busy)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
