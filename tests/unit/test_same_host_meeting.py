"""Workers find out who shares their host, both ends alike, and let nobody else in."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist

from deepopt.errors import TransportError
from deepopt.pipeline.same_host_meeting import Meeting, Place

TIMEOUT_S = 20.0
HERE = Place.here()
ELSEWHERE = Place("another start of a kernel", HERE.network, HERE.user)

Connections = dict[int, list[socket.socket]]


def hash_store() -> dist.HashStore:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    return store


def meet(
    places: list[Place | None],
    *,
    announced: Callable[[dist.HashStore], None] = lambda store: None,
) -> list[Connections]:
    """Let a worker at each place meet the others; `announced` acts between the two halves."""
    store = hash_store()
    meetings = [
        Meeting(
            rank=rank,
            world_size=len(places),
            num_lines=2,
            timeout_s=TIMEOUT_S,
            adopt=lambda one: one,
            place=place,
        )
        for rank, place in enumerate(places)
    ]
    for meeting in meetings:
        meeting.announce(store)
    announced(store)
    found: dict[int, Connections] = {}

    def work(rank: int) -> None:
        found[rank] = meetings[rank].connect(store)

    threads = [
        threading.Thread(target=work, args=(r,), daemon=True) for r in range(len(places))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for meeting in meetings:
        meeting.close()
    return [found[rank] for rank in range(len(places))]


def leave(found: list[Connections]) -> None:
    for lines in (lines for connections in found for lines in connections.values()):
        for line in lines:
            line.close()


def partners(found: list[Connections]) -> list[list[int]]:
    return [sorted(connections) for connections in found]


def test_each_pair_of_a_host_has_its_lines_and_no_two_are_mixed_up() -> None:
    found = meet([HERE] * 4)
    assert partners(found) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    for rank, connections in enumerate(found):
        for other, lines in connections.items():
            for number, line in enumerate(lines):
                line.sendall(bytes([rank, other, number]))
    for rank, connections in enumerate(found):
        for other, lines in connections.items():
            for number, line in enumerate(lines):
                line.settimeout(TIMEOUT_S)
                assert line.recv(3) == bytes([other, rank, number])
    leave(found)


def test_workers_of_several_hosts_meet_those_of_their_own() -> None:
    found = meet([HERE, ELSEWHERE, HERE, ELSEWHERE, None])
    assert partners(found) == [[2], [3], [0], [1], []]
    leave(found)


@pytest.mark.parametrize(
    "other",
    [
        Place(HERE.host, HERE.network + 1, HERE.user),
        Place(HERE.host, HERE.network, HERE.user + 1),
    ],
    ids=["another network", "another user"],
)
def test_what_keeps_sockets_or_users_apart_keeps_workers_apart(other: Place) -> None:
    assert partners(meet([HERE, other])) == [[], []]


def test_where_one_end_does_not_reach_the_other_both_go_without() -> None:
    def hide(store: dist.HashStore) -> None:
        told = json.loads(store.get("same-host/1"))
        store.set("same-host/1", json.dumps(told | {"name": "deepopt-nobody-listens-here"}))

    found = meet([HERE] * 3, announced=hide)
    assert partners(found) == [[2], [2], [0, 1]]
    leave(found)


def test_where_no_memory_can_be_shared_workers_go_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise PermissionError(f"{name} is not allowed")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert partners(meet([HERE] * 2)) == [[], []]
    assert "no memory is shared with workers of this host: deepopt-tensors" in caplog.text


def test_a_stranger_is_not_taken_for_a_peer() -> None:
    strangers: list[socket.socket] = []

    def intrude(store: dist.HashStore) -> None:
        name = json.loads(store.get("same-host/1"))["name"]
        for hello in (b"", b"\0" * 24, b"short"):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            stranger.connect(f"\0{name}")
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            strangers.append(stranger)

    found = meet([HERE] * 2, announced=intrude)
    assert partners(found) == [[1], [0]]
    for stranger in strangers:
        stranger.settimeout(TIMEOUT_S)
        with suppress(ConnectionResetError):  # what it said was not all read
            assert stranger.recv(1) == b""
        stranger.close()
    leave(found)


def test_an_interrupt_ends_the_wait_for_a_peer_that_died_before_it_called() -> None:
    store = hash_store()
    sockets: list[socket.socket] = []

    def adopt(one: socket.socket) -> socket.socket:
        sockets.append(one)
        return one

    meeting = Meeting(
        rank=1, world_size=2, num_lines=2, timeout_s=TIMEOUT_S, adopt=adopt, place=HERE
    )
    meeting.announce(store)
    store.set("same-host/0", store.get("same-host/1"))
    store.set("same-host-reached/0", "[1]")  # and then it dies

    errors: list[str] = []

    def work() -> None:
        try:
            meeting.connect(store)
        except TransportError as error:
            errors.append(error.message)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    sockets[0].shutdown(socket.SHUT_RDWR)
    thread.join(TIMEOUT_S)
    meeting.close()
    assert errors == ["meeting the workers of this host was interrupted"]


def test_a_peer_that_never_calls_is_waited_for_until_the_timeout() -> None:
    store = hash_store()
    meeting = Meeting(
        rank=1, world_size=2, num_lines=1, timeout_s=0.05, adopt=lambda one: one, place=HERE
    )
    meeting.announce(store)
    store.set("same-host/0", store.get("same-host/1"))
    store.set("same-host-reached/0", "[1]")
    with pytest.raises(TransportError, match=r"a peer did not call within 0\.05 s"):
        meeting.connect(store)
    meeting.close()
