"""Pieces of layers' states between two workers of one host, from any thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_socket import WordSocket
from deepopt.pipeline.same_host_state_link import PendingPiece, PendingSend, StateLink
from deepopt.pipeline.shareable_memory import place_of, shareable_bytes

TIMEOUT_S = 20.0
BYTES = 3 << 20


@pytest.fixture
def ends() -> Iterator[tuple[StateLink, StateLink]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    found = (
        StateLink(WordSocket(one, peer=1, timeout_s=TIMEOUT_S)),
        StateLink(WordSocket(other, peer=0, timeout_s=TIMEOUT_S)),
    )
    yield found
    for link in found:
        link.close()


def in_thread(pending: PendingSend | PendingPiece) -> threading.Thread:
    thread = threading.Thread(target=pending.wait, daemon=True)
    thread.start()
    return thread


def test_a_send_is_done_when_the_piece_was_taken(ends: tuple[StateLink, StateLink]) -> None:
    piece, into = (
        torch.randint(256, (BYTES,), dtype=torch.uint8),
        torch.zeros(BYTES, dtype=torch.uint8),
    )
    sent = in_thread(ends[0].send(0, piece))
    sent.join(0.02)
    assert sent.is_alive()
    PendingPiece(ends[1], 0, into).wait()
    sent.join(TIMEOUT_S)
    assert not sent.is_alive()
    assert torch.equal(piece, into)


def test_pieces_one_after_the_other_use_one_slot_and_stay_in_order(
    ends: tuple[StateLink, StateLink],
) -> None:
    into = torch.empty(1000)
    for value in range(5):
        pending = ends[0].send(0, torch.full((1000,), float(value)))
        PendingPiece(ends[1], 0, into).wait()
        pending.wait()
        assert into.unique().tolist() == [float(value)]
    assert ends[0]._outgoing.num_slots == 1


def test_several_threads_may_wait_on_one_link(ends: tuple[StateLink, StateLink]) -> None:
    tensors = [torch.empty(10) for _ in range(6)]
    threads = [in_thread(PendingPiece(ends[1], i, t)) for i, t in enumerate(tensors)]
    sends = [ends[0].send(i, torch.full((10,), float(i))) for i in (3, 0, 5, 1, 4, 2)]
    waits = [in_thread(pending) for pending in sends]
    for thread in threads + waits:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert [tensor.unique().tolist() for tensor in tensors] == [[float(i)] for i in range(6)]


@pytest.mark.parametrize("way", ["interrupt", "cut", "close"])
def test_all_threads_that_wait_hear_of_the_end(
    ends: tuple[StateLink, StateLink], way: str
) -> None:
    errors: list[str] = []

    def wait(number: int) -> None:
        try:
            ends[1].receive_into(number, torch.empty(1))
        except TransportError as error:
            errors.append(error.message)

    threads = [threading.Thread(target=wait, args=(i,), daemon=True) for i in range(3)]
    for thread in threads:
        thread.start()
    getattr(ends[1], way)()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert len(errors) == 3
    with pytest.raises(TransportError, match="rank 0"):
        ends[1].receive_into(0, torch.empty(1))
    with pytest.raises(TransportError, match="rank 1"):
        ends[0].send(0, torch.empty(1)).wait()


def test_a_piece_of_shareable_memory_is_read_where_it_lies(
    ends: tuple[StateLink, StateLink],
) -> None:
    memory = shareable_bytes(BYTES)
    memory.copy_(torch.randint(256, (BYTES,), dtype=torch.uint8))
    for first in range(0, BYTES, BYTES // 3):
        piece = memory[first : first + BYTES // 3]
        into = torch.empty_like(piece)
        sent = in_thread(ends[0].send(0, piece))
        sent.join(0.02)
        assert sent.is_alive()  # it must not change before it was read
        PendingPiece(ends[1], 0, into).wait()
        sent.join(TIMEOUT_S)
        assert not sent.is_alive()
        assert torch.equal(into, piece)
    assert ends[0]._outgoing.num_slots == 0
    assert len(ends[0]._shown) == len(ends[1]._seen) == 1  # its descriptor went over once
    floats = memory[64:1088].view(torch.float32)
    arrived = torch.empty(256)
    pending = ends[0].send(1, floats)
    PendingPiece(ends[1], 1, arrived).wait()
    pending.wait()
    assert torch.equal(arrived.view(torch.uint8), floats.view(torch.uint8))


def test_what_lies_between_lines_or_is_not_contiguous_is_copied(
    ends: tuple[StateLink, StateLink],
) -> None:
    memory = shareable_bytes(4096).random_()
    for piece in (memory[1:101], memory[::2][:100]):
        pending = ends[0].send(0, piece)
        into = torch.empty(100, dtype=torch.uint8)
        PendingPiece(ends[1], 0, into).wait()
        pending.wait()
        assert torch.equal(into, piece)
    assert not ends[1]._seen


def test_shareable_memory_and_its_descriptor_go_with_its_last_tensor() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory = shareable_bytes(4096).fill_(7)
    assert place_of(memory[64:]) is not None
    assert place_of(torch.empty(3)) is None
    part = memory[100:]
    del memory
    assert place_of(part) is not None
    assert part.unique().tolist() == [7]
    del part
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_piece_of_another_size_is_refused(ends: tuple[StateLink, StateLink]) -> None:
    ends[0].send(0, torch.empty(100))
    with pytest.raises(TransportError, match="a piece takes 448 bytes, and its tensor 64"):
        ends[1].receive_into(0, torch.empty(1))
