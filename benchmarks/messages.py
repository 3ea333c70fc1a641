"""What a message between two workers of one host takes: through shared memory, and through gloo's sockets.

Two processes send tensors to and fro, exchange figures, and copy pieces of a state into each other's memory,
by both ways in turns. CPU time is that of one end, all of its threads; the call is what the
training thread spends in `send`, receives wait meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say, table
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from deepopt.pipeline.process_group import ProcessGroupTransport
from deepopt.pipeline.same_host_transport import SameHostTransport
from deepopt.pipeline.shareable_memory import shareable_bytes
from deepopt.pipeline.transport import Channel, Kind, Pending, TensorSpec, Transport
from deepopt.worker.rendezvous import serve_store

TIMEOUT_S = 60.0
WAYS = ("shared memory", "gloo")
SIZES_BYTES = (1 << 10, 1 << 16, 1 << 18, 1 << 20, 12 << 20)
COMPARED_BYTES = 1 << 18  # of the ratio: activations of a small model
FIGURES = 50  # of an exchange
STATE_BYTES, PIECE_BYTES = 12 << 20, 2 << 20
WARM_UP = 3

Taken = tuple[float, float, float]
"""Seconds of one message: wall, CPU of this end, CPU in the call to `send`."""


def main() -> None:
    """Measure both ways and print the table and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, help="of each size and way [60, quick: 5]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 60)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    say(
        f"job:      2 processes x 1 thread, {rounds} rounds of each by both ways in turns, mean"
    )
    server = serve_store("127.0.0.1")
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=_work, args=(rank, server.port, rounds, answers), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    measured: dict[str, dict[str, Taken]] = answers.get(timeout=10 * TIMEOUT_S)
    for process in processes:
        process.join(TIMEOUT_S)
    rows = []
    for what, by_way in measured.items():
        for way in WAYS:
            wall_s, cpu_s, call_s = by_way[way]
            call = f"{1e6 * call_s:.0f}" if call_s else "-"
            rows.append((what, way, f"{1e6 * wall_s:.0f}", f"{1e6 * cpu_s:.0f}", call))
    say("\n" + table(("what", "way", "wall us", "CPU us an end", "send us"), rows) + "\n")
    ours, gloo = (measured[_name(COMPARED_BYTES)][way] for way in WAYS)
    say(
        f"CPU time of gloo's messages of {_name(COMPARED_BYTES)} against those of shared memory"
    )
    say(ratio_line(gloo[1] / ours[1], aim=None))


def _work(rank: int, port: int, rounds: int, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device = torch.device("cpu")
    gloo = ProcessGroupTransport(
        rank=rank, world_size=2, device=device, timeout_s=TIMEOUT_S, form_timeout_s=TIMEOUT_S
    )
    shared = SameHostTransport(
        gloo, device=device, timeout_s=TIMEOUT_S, form_timeout_s=TIMEOUT_S
    )
    shared.join(PrefixStore("messages", TCPStore("127.0.0.1", port)), generation=1)
    assert shared.neighbours == (1 - rank,), "two processes of one host do not share memory"
    ways: dict[str, Transport] = dict(zip(WAYS, (shared, gloo), strict=True))
    shared.open(Channel(Kind.ACTIVATION, source, 1 - source) for source in (0, 1))
    measured = {}
    for size in SIZES_BYTES:
        measured[_name(size)] = _in_turns(
            ways, rounds, lambda way, index, size=size: _ping_pong(way, size, index)
        )
    measured[f"exchange of {FIGURES} figures"] = _in_turns(ways, rounds, _exchange)
    state = shareable_bytes(STATE_BYTES).fill_(1)  # as copies of layers lie
    into = torch.empty_like(state)
    measured[f"state of {_name(STATE_BYTES)} both ways"] = _in_turns(
        ways, max(1, rounds // 5), lambda way, _: _copy_state(way, state, into)
    )
    if rank == 0:
        answers.put(measured)
    gloo.start_all_gather([1.0]).wait()
    shared.close()


def _in_turns(
    ways: dict[str, Transport], rounds: int, one: Callable[[Transport, int], Taken]
) -> dict[str, Taken]:
    """The means of both ways; one round of each after the other, so that both see the same moments."""
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for index in range(WARM_UP + rounds):
        for name, way in ways.items():
            taken[name].append(one(way, index))
    return {
        name: tuple(map(statistics.fmean, zip(*all_taken[WARM_UP:], strict=True)))  # type: ignore[misc]
        for name, all_taken in taken.items()
    }


def _ping_pong(transport: Transport, size_bytes: int, index: int) -> Taken:
    """One message each way, halved."""
    rank = transport.rank
    out, back = (Channel(Kind.ACTIVATION, r, 1 - r) for r in (rank, 1 - rank))
    tensor = torch.ones(size_bytes // 4)
    message = index * len(SIZES_BYTES) + SIZES_BYTES.index(size_bytes)
    began_s, used_s = time.perf_counter(), time.process_time()
    pending = transport.receive(back, message, (TensorSpec.of(tensor),))
    if rank:
        (tensor,) = pending.wait()
    before_s = time.thread_time()
    transport.send(out, message, (tensor,))
    call_s = time.thread_time() - before_s
    if not rank:
        (tensor,) = pending.wait()
    transport.finish_sends()
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - used_s
    return wall_s / 2, cpu_s / 2, call_s  # an end has two of the four ends of two messages


def _exchange(transport: Transport, index: int) -> Taken:
    began_s, used_s = time.perf_counter(), time.process_time()
    transport.start_all_gather([float(index)] * FIGURES).wait()
    return time.perf_counter() - began_s, time.process_time() - used_s, 0.0


def _copy_state(transport: Transport, state: torch.Tensor, into: torch.Tensor) -> Taken:
    """As copies of layers are made: piece by piece, both ways."""
    rank = transport.rank
    out, back = (Channel(Kind.STATE, r, 1 - r) for r in (rank, 1 - rank))
    began_s, used_s = time.perf_counter(), time.process_time()
    for first in range(0, len(state), PIECE_BYTES):
        part = slice(first, first + PIECE_BYTES)
        pending: list[Pending] = [
            transport.receive_into(back, 0, into[part]),
            transport.send_apart(out, 0, state[part]),
        ]
        for one in pending:
            one.wait()
    return time.perf_counter() - began_s, time.process_time() - used_s, 0.0


def _name(size_bytes: int) -> str:
    return f"{size_bytes >> 10} KiB" if size_bytes < 1 << 20 else f"{size_bytes >> 20} MiB"


if __name__ == "__main__":
    main()
