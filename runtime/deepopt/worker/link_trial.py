"""What a message between two workers takes: ping-pong over the transport that training uses.

Both ends call `try_link` with the same arguments, at the same time. Wall time gives latency and rate,
CPU time what a message costs the cores at each end; each is a line through several sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import sub
from statistics import median, quantiles

import torch

from deepopt.pipeline.transport import Channel, Kind, TensorSpec, Transport
from deepopt.planner.alpha_beta import AlphaBeta, fit

SIZES_BYTES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22)
_ROUNDS = 12  # of each size, after two that warm up
_WARM_UP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTrial:
    """A link as one of its ends sees it.

    Args:
        wall: one way.
        thread: CPU time of the thread that trains, of a message at this end.
        process: CPU time of all threads, of a message at this end.
    """

    wall: AlphaBeta
    thread: AlphaBeta
    process: AlphaBeta


def try_link(
    transport: Transport,
    *,
    ranks: tuple[int, int],
    device: torch.device,
    first_message: int,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    rounds: int = _ROUNDS,
    between: Callable[[], object] | None = None,
) -> LinkTrial:
    """Send messages to and fro; the first rank begins.

    Args:
        transport: of one of the two ranks; its channels for activations both ways are open.
        ranks: the two ends.
        device: where tensors live.
        first_message: number of the first message, above all that were sent before.
        sizes_bytes: of the messages.
        rounds: of each size.
        between: what an end does between two rounds, as a worker computes between its messages: CPU times are
            the medians then, for what they have on top is what they will have in a training; wall times say
            nothing.
    """
    first, second = ranks
    there = Channel(Kind.ACTIVATION, first, second)
    back = Channel(Kind.ACTIVATION, second, first)
    begins = transport.rank == first
    sends, receives = (there, back) if begins else (back, there)
    message = first_message
    sizes: list[float] = []
    walls: list[float] = []
    threads: list[float] = []
    processes: list[float] = []
    for size in sizes_bytes:
        tensor = torch.zeros(size // 4, dtype=torch.float32, device=device)
        spec = (TensorSpec.of(tensor),)
        took: list[tuple[float, float, float]] = []
        for _ in range(_WARM_UP + rounds):
            if between is not None:
                between()
            began = (time.perf_counter(), time.thread_time(), time.process_time())
            pending = transport.receive(receives, message, spec)
            if begins:
                transport.send(sends, message, (tensor,))
                (tensor,) = pending.wait()
            else:
                (tensor,) = pending.wait()
                transport.send(sends, message, (tensor,))
            transport.finish_sends()
            message += 1
            ended = (time.perf_counter(), time.thread_time(), time.process_time())
            wall, thread, process = map(sub, ended, began)
            took.append((wall / 2, thread / 2, process / 2))  # a round is two messages
        sizes.append(float(size))
        middle: Callable[[Sequence[float]], float] = _low if between is None else median
        wall, thread, process = map(middle, zip(*took[_WARM_UP:], strict=True))
        walls.append(wall)
        threads.append(thread)
        processes.append(process)
    return LinkTrial(
        wall=fit(sizes, times_s=walls),
        thread=fit(sizes, times_s=threads),
        process=fit(sizes, times_s=processes),
    )


def _low(times_s: Sequence[float]) -> float:
    """The lower quartile: what else runs on a host only ever adds to a time."""
    return quantiles(times_s, n=4)[0]


def num_messages(sizes_bytes: Sequence[int] = SIZES_BYTES, *, rounds: int = _ROUNDS) -> int:
    """How many numbers of messages a trial of a link takes.

    Args:
        sizes_bytes: as for `try_link`.
        rounds: as for `try_link`.
    """
    return len(sizes_bytes) * (_WARM_UP + rounds)


def pairs_to_try(hosts: Sequence[str], *, most: int = 12) -> tuple[tuple[int, int], ...]:
    """Which pairs of workers to measure: all of a few, else one for each pair of hosts.

    Args:
        hosts: of each rank.
        most: pairs that are all measured.
    """
    ranks = range(len(hosts))
    every = [(a, b) for a in ranks for b in ranks if a < b]
    if len(every) <= most:
        return tuple(every)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for a, b in every:
        found.setdefault((hosts[a], hosts[b]), (a, b))
    return tuple(found.values())
