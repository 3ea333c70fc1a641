"""What a message costs the CPU of a host at each end, tried in one process: two ends of a gloo group
on two threads, over the loopback; and how long one takes to an end that sleeps, as those of a pipeline do.

Workers of one host talk through the same sockets. `link_trial` measures the same between real workers;
this is for a launch that calibrates without any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from deepopt.planner.alpha_beta import AlphaBeta, fit

SIZES_BYTES = (1 << 12, 1 << 16, 1 << 19)
_ROUNDS = 40
_WAKES = 16
_PAUSE_S = 1e-2  # long enough for both ends to sleep, and for their cores to do something else
OTHER_DATA_BYTES = 4 << 20  # more than the caches of a core
_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTrial:
    """A message between two workers of this host.

    Args:
        wall: one way.
        process: CPU time of each end, all of its threads.
        thread: CPU time of each end, of the thread that calls alone.
        woken_s: one way where both ends slept before: with the host's delay in waking them. The mean,
            since all such delays on the way through a pipeline add up.
        woken_thread_s: CPU time of each end then, of the thread that calls alone: what it needs has left the
            caches. The mean.
    """

    wall: AlphaBeta
    process: AlphaBeta
    thread: AlphaBeta
    woken_s: float
    woken_thread_s: float


def try_messages(sizes_bytes: Sequence[int] = SIZES_BYTES) -> MessageTrial:
    """Send messages to and fro between two threads. Of a size the fastest counts, since what else runs
    on the host only ever adds to a time; of those that wake an end, all do: it will run then, too.

    Args:
        sizes_bytes: of the messages.

    Raises:
        RuntimeError: gloo cannot be used here.
    """
    store = HashStore()
    walls: list[float] = []
    processes: list[float] = []
    threads: list[float] = []

    def answer() -> None:
        group = _group(store, 1)
        _ping_pong(group, 1, sizes_bytes, walls=[], processes=[], threads=[])
        _wake_each_other(group, 1)

    other = threading.Thread(target=answer, name="answer", daemon=True)
    other.start()
    group = _group(store, 0)
    _ping_pong(group, 0, sizes_bytes, walls=walls, processes=processes, threads=threads)
    woken_s, woken_thread_s = _wake_each_other(group, 0)
    other.join(_TIMEOUT.total_seconds())
    sizes = [float(size) for size in sizes_bytes]
    return MessageTrial(
        wall=fit(sizes, times_s=walls),
        process=fit(sizes, times_s=processes),
        thread=fit(sizes, times_s=threads),
        woken_s=woken_s,
        woken_thread_s=woken_thread_s,
    )


def _group(store: HashStore, rank: int) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # its annotations are half there
    options = gloo._Options()
    options._devices = [gloo.create_device(interface="lo")]
    options._timeout = _TIMEOUT
    return gloo(store, rank, 2, options)


def _wake_each_other(group: Any, rank: int) -> tuple[float, float]:
    """Seconds of a message one way to an end that slept, and CPU time of an end; the means."""
    tensor, other_data = torch.zeros(SIZES_BYTES[0] // 4), torch.zeros(OTHER_DATA_BYTES // 4)
    took: list[float] = []
    used: list[float] = []
    for index in range(_WAKES):
        arrived = torch.empty_like(tensor)
        receive = group.recv([arrived], 1 - rank, 2 * index + 1 - rank)
        other_data.add_(1.0)  # as a worker computes between its messages
        if rank:
            receive.wait()
            time.sleep(_PAUSE_S)  # the other end sleeps now
        else:
            time.sleep(_PAUSE_S)  # so does the other
        own, began = time.thread_time(), time.perf_counter()
        group.send([tensor], 1 - rank, 2 * index + rank).wait()
        if not rank:
            receive.wait()
            took.append((time.perf_counter() - began - _PAUSE_S) / 2)
            used.append((time.thread_time() - own) / 2)  # an end of two messages
    count = max(1, len(took))
    return max(0.0, sum(took) / count), sum(used) / count


def _ping_pong(
    group: Any,
    rank: int,
    sizes_bytes: Sequence[int],
    *,
    walls: list[float],
    processes: list[float],
    threads: list[float],
) -> None:
    tensors = [torch.zeros(size // 4) for size in sizes_bytes]
    took: list[list[float]] = [[] for _ in tensors]
    used: list[list[float]] = [[] for _ in tensors]
    called: list[list[float]] = [[] for _ in tensors]
    # In turns, so that a busy moment of the host meets all sizes.
    for index in range(_ROUNDS * len(tensors)):
        size = index % len(tensors)
        before, own, began = time.process_time(), time.thread_time(), time.perf_counter()
        arrived = torch.empty_like(tensors[size])  # fresh storage, as the transport has it
        works = [group.recv([arrived], 1 - rank, 2 * index + 1 - rank)]
        if rank:
            works.pop().wait()
        group.send([tensors[size]], 1 - rank, 2 * index + rank).wait()
        for work in works:
            work.wait()
        took[size].append((time.perf_counter() - began) / 2)
        # Each round is two messages with two ends each, all in this process.
        used[size].append((time.process_time() - before) / 4)
        called[size].append((time.thread_time() - own) / 2)
    walls += map(min, took)
    processes += map(min, used)
    threads += map(min, called)
