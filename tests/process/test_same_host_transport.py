"""Workers of one host over shared memory, in processes: deaths, silences, generations, other hosts."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, TCPStore

from deepopt.errors import TransportError
from deepopt.pipeline.process_group import ProcessGroupTransport
from deepopt.pipeline.same_host_meeting import Place
from deepopt.pipeline.same_host_transport import SameHostTransport
from deepopt.pipeline.transport import (
    Channel,
    Kind,
    Pending,
    PendingGather,
    PendingReceive,
    TensorSpec,
)
from deepopt.worker.rendezvous import serve_store, transport_of_group
from support.forking import fork_context

TIMEOUT_S = 20.0
SHORT_S = 0.3
GENERATIONS = 20
CPU = torch.device("cpu")
THERE = Channel(Kind.ACTIVATION, 0, 1)
BACK = Channel(Kind.GRADIENT, 1, 0)
SUM = Channel(Kind.REDUCTION, 0, 1)
STATES = Channel(Kind.STATE, 0, 1)
LONGEST = 1 << 20
TENSORS = (
    torch.randn(3, 5).bfloat16(),
    torch.arange(6, dtype=torch.int64).view(2, 3).t(),
    torch.tensor(0.1, dtype=torch.float64),
    torch.empty(0, 2),
)
SPECS = tuple(TensorSpec.of(tensor) for tensor in TENSORS)


class Peers:
    """Both ends of a group of two: that of this process, and what another process does."""

    def __init__(self, root: TCPStore, pid: int, transport: SameHostTransport) -> None:
        self.root, self.pid, self.transport = root, pid, transport

    def join(self, generation: int = 1) -> SameHostTransport:
        self.transport.join(PrefixStore(f"g{generation}", self.root), generation=generation)
        self.transport.open([THERE, BACK, SUM])
        return self.transport


def make(rank: int, *, place: Place | None = None, timeout_s: float) -> SameHostTransport:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    within = ProcessGroupTransport(
        rank=rank, world_size=2, device=CPU, timeout_s=timeout_s, form_timeout_s=TIMEOUT_S
    )
    return SameHostTransport(
        within, device=CPU, timeout_s=timeout_s, form_timeout_s=TIMEOUT_S, place=place
    )


def client(port: int) -> TCPStore:
    timeout = timedelta(seconds=TIMEOUT_S)
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)


def run_peer(port: int, act: Callable[[Peers], None], place: Place | None) -> None:
    torch.set_num_threads(1)
    act(Peers(client(port), os.getpid(), make(1, place=place, timeout_s=TIMEOUT_S)))


@contextmanager
def peer_that(
    act: Callable[[Peers], None], *, place: Place | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Peers]:
    """This process is rank 0; in another `act` is rank 1."""
    server = serve_store("127.0.0.1")
    process: Any = fork_context().Process(
        target=run_peer, args=(server.port, act, place), daemon=True
    )
    process.start()
    peers = Peers(client(server.port), process.pid, make(0, timeout_s=timeout_s))
    try:
        yield peers
    finally:
        peers.transport.close()
        process.join(TIMEOUT_S)
        process.kill()


def echo(peers: Peers) -> None:
    """Send back what comes, by each kind of channel."""
    transport = peers.join()
    for channel in (THERE, SUM):
        transport.send(BACK, 0, transport.receive(channel, 0, SPECS).wait())
    taken = torch.empty(LONGEST)
    transport.receive_into(STATES, 0, taken).wait()
    transport.send(BACK, 1, (taken,))
    transport.start_all_gather([0.1, 2.0]).wait()
    transport.close()


@pytest.mark.parametrize("place", [None, Place("another host", 0, 0)], ids=["same", "other"])
def test_all_that_is_sent_arrives_bit_by_bit_on_one_host_and_on_two(
    place: Place | None,
) -> None:
    with peer_that(echo, place=place) as peers:
        transport = peers.join()
        assert transport.neighbours == ((1,) if place is None else ())
        for channel in (THERE, SUM):
            transport.send_awaited(channel, 0, TENSORS).wait()
            arrived = transport.receive(BACK, 0, SPECS).wait()
            assert all(map(torch.equal, arrived, TENSORS))
            assert [tensor.dtype for tensor in arrived] == [spec.dtype for spec in SPECS]
        state = torch.randn(LONGEST)
        transport.send_apart(STATES, 0, state).wait()
        (back,) = transport.receive(BACK, 1, [TensorSpec.of(state)]).wait()
        assert torch.equal(back, state)
        rows = transport.start_all_gather([1.0, -3.0]).wait()
        assert rows == [[1.0, -3.0], [0.1, 2.0]]
        transport.finish_sends()


def wait_for_ever(peers: Peers) -> None:
    peers.join()
    signal.pause()


def post(
    transport: SameHostTransport, kind: Kind | None
) -> Pending | PendingReceive | PendingGather:
    """Something that only the peer can end: a receive, or an exchange (None)."""
    if kind is None:
        return transport.start_all_gather([1.0])
    if kind is Kind.STATE:
        return transport.receive_into(Channel(kind, 1, 0), 0, torch.empty(4))
    return transport.receive(BACK, 0, SPECS)


@pytest.mark.parametrize("kind", [Kind.GRADIENT, Kind.STATE])
def test_a_killed_peer_is_heard_of_at_once(kind: Kind) -> None:
    with peer_that(wait_for_ever) as peers:
        transport = peers.join()
        threading.Timer(0.05, os.kill, (peers.pid, signal.SIGKILL)).start()
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="rank 1 failed: Connection closed by peer"):
            post(transport, kind).wait()
        assert time.monotonic() - began_s < TIMEOUT_S / 2


def test_a_stopped_peer_is_waited_for_until_the_timeout() -> None:
    with peer_that(wait_for_ever, timeout_s=SHORT_S) as peers:
        transport = peers.join()
        os.kill(peers.pid, signal.SIGSTOP)
        with pytest.raises(TransportError, match=r"from rank 1 failed: Timed out after 0\.3 s"):
            transport.receive(BACK, 0, SPECS).wait()
        transport.send(THERE, 0, TENSORS)  # nobody has to take it
        transport.finish_sends()
        os.kill(peers.pid, signal.SIGKILL)


def hear_of_the_end(peers: Peers) -> None:
    transport = peers.join()
    try:
        transport.receive(THERE, 0, SPECS).wait()
    except TransportError:
        peers.root.set("heard", "")
    signal.pause()


@pytest.mark.parametrize("kind", [Kind.GRADIENT, Kind.STATE, None])
def test_an_interrupt_ends_waits_on_both_sides(kind: Kind | None) -> None:
    with peer_that(hear_of_the_end) as peers:
        transport = peers.join()
        threading.Timer(0.05, transport.interrupt, (1,)).start()
        with pytest.raises(TransportError):
            post(transport, kind).wait()
        with pytest.raises(TransportError):  # who asks later is told as well
            transport.receive(BACK, 0, SPECS).wait()
        client_of_its_own = client(peers.root.port)  # the interrupt ended that of the group
        client_of_its_own.wait(["heard"], timedelta(seconds=TIMEOUT_S))
        os.kill(peers.pid, signal.SIGKILL)


def test_a_generation_that_has_ended_is_not_joined() -> None:
    with peer_that(wait_for_ever) as peers:
        peers.transport.interrupt(1)
        with pytest.raises(TransportError, match="interrupted"):
            peers.join()
        os.kill(peers.pid, signal.SIGKILL)


def join_again_and_again(peers: Peers) -> None:
    for generation in range(1, GENERATIONS + 1):
        transport = peers.join(generation)
        transport.send(BACK, 0, transport.receive(THERE, 0, SPECS).wait())
        transport.start_all_gather([1.0]).wait()
    transport.close()


def held() -> tuple[int, int]:
    """Descriptors and pieces of shared memory of this process."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:deepopt-tensors")


def test_generations_leave_nothing_behind_and_their_tensors_stay() -> None:
    with peer_that(join_again_and_again) as peers:
        after: list[tuple[int, int]] = []
        kept = None
        for generation in range(1, GENERATIONS + 1):
            transport = peers.join(generation)
            transport.send(THERE, 0, TENSORS)
            arrived = transport.receive(BACK, 0, SPECS).wait()
            transport.start_all_gather([1.0]).wait()
            assert all(map(torch.equal, arrived, TENSORS))
            kept = arrived[0] if kept is None else kept
            del arrived
            after.append(held())
        assert kept is not None
        assert torch.equal(kept, TENSORS[0])
        descriptors, pieces = zip(*after, strict=True)
        assert max(descriptors[-5:]) <= max(descriptors[:5])  # gloo closes some of its own late
        # What is kept of the first generation holds its memory, one piece.
        assert set(pieces[1:]) == {pieces[0] + 1}


@pytest.mark.parametrize(
    ("same_host", "kind"),
    [("shared_memory", SameHostTransport), ("sockets", ProcessGroupTransport)],
)
def test_shared_memory_can_be_left_out(same_host: str, kind: type) -> None:
    transport = transport_of_group(
        rank=0,
        world_size=2,
        device=CPU,
        timeout_s=TIMEOUT_S,
        form_timeout_s=TIMEOUT_S,
        same_host=same_host,
    )
    assert type(transport) is kind
