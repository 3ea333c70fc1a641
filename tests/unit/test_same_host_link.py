"""Two workers of one host: messages in any order, more than a socket takes, and peers that go."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_link import Backlogs, HostLink
from deepopt.pipeline.same_host_memory import layout_of
from deepopt.pipeline.same_host_socket import WordSocket

TIMEOUT_S = 20.0
SHORT_S = 0.05
MANY = 1500  # a socket holds some 300 words

Ends = tuple[HostLink, HostLink]


def connect(timeout_s: float = TIMEOUT_S) -> Ends:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return (
        HostLink(
            WordSocket(one, peer=1, timeout_s=timeout_s), backlogs=Backlogs(timeout_s=timeout_s)
        ),
        HostLink(
            WordSocket(other, peer=0, timeout_s=timeout_s),
            backlogs=Backlogs(timeout_s=timeout_s),
        ),
    )


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = connect()
    yield found
    for link in found:
        link.close()


def number(value: float) -> torch.Tensor:
    return torch.full((3,), float(value))


LAYOUT = layout_of((number(0),))


def test_a_sender_may_change_its_tensor_at_once(ends: Ends) -> None:
    tensor = number(1)
    ends[0].send(0, 5, (tensor,))
    tensor.zero_()
    (arrived,) = ends[1].receive(0, 5, LAYOUT)
    assert arrived.tolist() == [1.0] * 3


@settings(deadline=None, max_examples=40)
@given(st.permutations([(k, m) for k in range(3) for m in range(4)]), st.data())
def test_messages_are_found_in_any_order_and_slots_serve_again(
    wanted: list[tuple[int, int]], data: st.DataObject
) -> None:
    sender, receiver = connect()
    try:
        sent = data.draw(st.permutations(wanted))
        for turn in range(3):
            for kind, message in sent:
                value = number(100 * turn + 10 * kind + message)
                sender.send(kind, message, (value,), once=kind == 2)
            kept = []
            for kind, message in wanted:
                (arrived,) = receiver.receive(kind, message, LAYOUT)
                kept.append((arrived, 100 * turn + 10 * kind + message))
            assert all(tensor.tolist() == [value] * 3 for tensor, value in kept)
            del kept, arrived
            receiver.free_unused()
        assert sender._outgoing.num_slots <= len(sent)
    finally:
        sender.close()
        receiver.close()


def test_memory_of_a_large_rare_message_is_not_kept(ends: Ends) -> None:
    large = torch.arange(1 << 17, dtype=torch.float32)
    for turn in range(3):
        ends[0].send(2, turn, (large, number(turn)), once=True)
        arrived = ends[1].receive(2, turn, layout_of((large, number(turn))))
        assert torch.equal(arrived[0], large)
        assert torch.equal(arrived[1], number(turn))
    assert ends[0]._outgoing.num_slots == 0


def test_messages_of_one_number_are_taken_in_the_order_of_their_sends(ends: Ends) -> None:
    for value in range(3):
        ends[0].send(1, 0, (number(value),))
    ends[0].send(1, 1, (number(9),))
    ends[1].receive(1, 1, LAYOUT)  # by now all are known
    taken = [ends[1].receive(1, 0, LAYOUT)[0][0].item() for _ in range(3)]
    assert taken == [0.0, 1.0, 2.0]


def test_numbers_of_an_exchange_are_exact(ends: Ends) -> None:
    values = [0.1, -1e308, float("inf"), 3]
    ends[0].send_values(4, 0, values)
    assert ends[1].receive_values(4, 0) == values
    ends[0].send_values(4, 1, [])
    assert ends[1].receive_values(4, 1) == []


def test_a_sender_is_never_kept_by_a_receiver_that_takes_nothing(ends: Ends) -> None:
    sender, receiver = ends
    for message in range(MANY):
        sender.send_values(0, message, [float(message)])
    assert sender.has_backlog
    thread = threading.Thread(target=sender._backlogs.wait)
    thread.start()
    taken = [receiver.receive_values(0, message) for message in range(MANY)]
    thread.join(TIMEOUT_S)
    assert taken == [[float(message)] for message in range(MANY)]
    assert not sender.has_backlog
    assert sender._backlogs.is_empty


def test_two_that_both_send_more_than_is_taken_and_then_receive_do_not_wait_for_each_other(
    ends: Ends,
) -> None:
    found: dict[int, list[float]] = {}

    def work(own: int) -> None:
        link = ends[own]
        for message in range(MANY):
            link.send_values(0, message, [float(own)])
        found[own] = [link.receive_values(0, message)[0] for message in range(MANY)]
        link._backlogs.wait()

    threads = [threading.Thread(target=work, args=(own,), daemon=True) for own in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert found == {0: [1.0] * MANY, 1: [0.0] * MANY}


def test_a_backlog_that_nobody_takes_ends_with_the_timeout() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    sender, receiver = connect(SHORT_S)
    for message in range(MANY):
        sender.send_values(0, message, [0.0])
    with pytest.raises(TransportError, match=r"send to rank 1 failed: Timed out after 0\.05 s"):
        sender._backlogs.wait()
    sender.close()
    receiver.close()
    # Those of slots that the peer never heard of are closed as well.
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_silent_peer_is_waited_for_until_the_timeout() -> None:
    ends = connect(SHORT_S)
    with pytest.raises(TransportError, match=r"rank 1 failed: Timed out after 0\.05 s"):
        ends[0].receive(0, 0, LAYOUT)
    for link in ends:
        link.close()


def test_a_peer_that_leaves_is_heard_of_behind_what_it_sent(ends: Ends) -> None:
    ends[0].send(0, 0, (number(4),))
    ends[0].close()
    (arrived,) = ends[1].receive(0, 0, LAYOUT)
    with pytest.raises(TransportError, match="receive from rank 0 failed: Connection closed"):
        ends[1].receive(0, 1, LAYOUT)
    with pytest.raises(TransportError, match="send to rank 0 failed: Connection closed"):
        ends[1].send(0, 0, (number(0),))
    ends[1].close()
    assert arrived.tolist() == [4.0] * 3  # what arrived stays


@pytest.mark.parametrize("way", ["interrupt", "cut"])
def test_another_thread_ends_a_wait_here_and_at_the_peer(ends: Ends, way: str) -> None:
    errors: dict[int, str] = {}

    def wait(own: int) -> None:
        try:
            ends[own].receive(0, 0, LAYOUT)
        except TransportError as error:
            errors[own] = error.message

    threads = [threading.Thread(target=wait, args=(own,), daemon=True) for own in (0, 1)]
    for thread in threads:
        thread.start()
    getattr(ends[0], way)()
    for thread in threads:
        thread.join(TIMEOUT_S)
    here = "was interrupted" if way == "interrupt" else "failed: Connection closed by peer"
    assert errors == {
        0: f"receive from rank 1 {here}",
        1: "receive from rank 0 failed: Connection closed by peer",
    }
    with pytest.raises(TransportError, match="receive from rank 1"):  # later, too
        ends[0].receive(0, 1, LAYOUT)


def test_a_message_of_another_size_is_refused(ends: Ends) -> None:
    ends[0].send(0, 0, (torch.zeros(100),))
    with pytest.raises(TransportError, match="takes 448 bytes, and its tensors 64"):
        ends[1].receive(0, 0, LAYOUT)
