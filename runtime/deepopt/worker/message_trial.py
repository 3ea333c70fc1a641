"""What a message costs the CPU of a host at each end, tried in one process: two ends on two threads, as
two workers of one host have them; and how long one takes to an end that sleeps, as those of a pipeline do.

Workers of one host talk through shared memory, or on request through gloo's sockets. `link_trial`
measures the same between real workers; this is for a launch that calibrates without any.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_link import Backlogs, HostLink
from deepopt.pipeline.same_host_memory import layout_of
from deepopt.pipeline.same_host_socket import WordSocket
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


def try_messages(
    sizes_bytes: Sequence[int] = SIZES_BYTES, *, same_host: str = "shared_memory"
) -> MessageTrial:
    """Send messages to and fro between two threads. Of a size the fastest counts, since what else runs
    on the host only ever adds to a time; of those that wake an end, all do: it will run then, too.

    Args:
        sizes_bytes: of the messages.
        same_host: `pipeline.same_host`.

    Raises:
        RuntimeError: this way cannot be used here.
    """
    ends = _shared_ends() if same_host == "shared_memory" else _GlooEnd.pair()
    walls: list[float] = []
    processes: list[float] = []
    threads: list[float] = []

    def answer() -> None:
        end = ends[1]()
        _ping_pong(end, 1, sizes_bytes, walls=[], processes=[], threads=[])
        _wake_each_other(end, 1)
        end.close()

    other = threading.Thread(target=answer, name="answer", daemon=True)
    other.start()
    end = ends[0]()
    try:
        _ping_pong(end, 0, sizes_bytes, walls=walls, processes=processes, threads=threads)
        woken_s, woken_thread_s = _wake_each_other(end, 0)
    except TransportError as error:
        raise RuntimeError(error.message) from error
    finally:
        end.close()
        other.join(_TIMEOUT.total_seconds())
    sizes = [float(size) for size in sizes_bytes]
    return MessageTrial(
        wall=fit(sizes, times_s=walls),
        process=fit(sizes, times_s=processes),
        thread=fit(sizes, times_s=threads),
        woken_s=woken_s,
        woken_thread_s=woken_thread_s,
    )


class _Posted(Protocol):
    def wait(self) -> object: ...


class _End(Protocol):
    """One end of a connection, for one thread."""

    def post_receive(self, message: int, like: torch.Tensor) -> _Posted:
        """What the next message of this number comes as."""
        ...

    def send(self, message: int, tensor: torch.Tensor) -> None:
        """Send; returns when it is out."""
        ...

    def close(self) -> None: ...


class _GlooEnd:
    def __init__(self, store: HashStore, rank: int) -> None:
        gloo: Any = dist.ProcessGroupGloo  # its annotations are half there
        options = gloo._Options()
        options._devices = [gloo.create_device(interface="lo")]
        options._timeout = _TIMEOUT
        self._group = gloo(store, rank, 2, options)
        self._peer = 1 - rank

    @classmethod
    def pair(cls) -> tuple[Callable[[], _End], Callable[[], _End]]:
        """What makes each end, on its own thread: both wait for each other."""
        store = HashStore()
        return partial(cls, store, 0), partial(cls, store, 1)

    def post_receive(self, message: int, like: torch.Tensor) -> _Posted:
        arrived = torch.empty_like(like)  # fresh storage, as the transport has it
        work: _Posted = self._group.recv([arrived], self._peer, message)
        return work

    def send(self, message: int, tensor: torch.Tensor) -> None:
        self._group.send([tensor], self._peer, message).wait()

    def close(self) -> None:
        pass


class _SharedEnd:
    def __init__(self, connection: socket.socket, peer: int) -> None:
        timeout_s = _TIMEOUT.total_seconds()
        words = WordSocket(connection, peer=peer, timeout_s=timeout_s)
        self._link = HostLink(words, backlogs=Backlogs(timeout_s=timeout_s))

    def post_receive(self, message: int, like: torch.Tensor) -> _Posted:
        return _SharedReceive(self._link, message, like)

    def send(self, message: int, tensor: torch.Tensor) -> None:
        self._link.send(0, message, (tensor,))

    def close(self) -> None:
        self._link.close()


def _shared_ends() -> tuple[Callable[[], _End], Callable[[], _End]]:
    """What makes each end of a connection, on its own thread."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return partial(_SharedEnd, one, 1), partial(_SharedEnd, other, 0)


class _SharedReceive:
    def __init__(self, link: HostLink, message: int, like: torch.Tensor) -> None:
        self._link = link
        self._message = message
        self._like = like

    def wait(self) -> object:
        return self._link.receive(0, self._message, layout_of((self._like,)))


def _wake_each_other(end: _End, rank: int) -> tuple[float, float]:
    """Seconds of a message one way to an end that slept, and CPU time of an end; the means."""
    tensor, other_data = torch.zeros(SIZES_BYTES[0] // 4), torch.zeros(OTHER_DATA_BYTES // 4)
    took: list[float] = []
    used: list[float] = []
    for index in range(_WAKES):
        receive = end.post_receive(2 * index + 1 - rank, tensor)
        other_data.add_(1.0)  # as a worker computes between its messages
        if rank:
            receive.wait()
            time.sleep(_PAUSE_S)  # the other end sleeps now
        else:
            time.sleep(_PAUSE_S)  # so does the other
        own, began = time.thread_time(), time.perf_counter()
        end.send(2 * index + rank, tensor)
        if not rank:
            receive.wait()
            took.append((time.perf_counter() - began - _PAUSE_S) / 2)
            used.append((time.thread_time() - own) / 2)  # an end of two messages
    count = max(1, len(took))
    return max(0.0, sum(took) / count), sum(used) / count


def _ping_pong(
    end: _End,
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
        receive = end.post_receive(2 * index + 1 - rank, tensors[size])
        if rank:
            receive.wait()
        end.send(2 * index + rank, tensors[size])
        if not rank:
            receive.wait()
        took[size].append((time.perf_counter() - began) / 2)
        # Each round is two messages with two ends each, all in this process.
        used[size].append((time.process_time() - before) / 4)
        called[size].append((time.thread_time() - own) / 2)
    walls += map(min, took)
    processes += map(min, used)
    threads += map(min, called)
