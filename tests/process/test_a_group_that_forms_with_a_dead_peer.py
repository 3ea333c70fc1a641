"""A group that forms while one of its workers is dead: the head's word ends it, not a timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from deepopt.errors import TransportError
from deepopt.pipeline.process_group import ProcessGroupTransport

TIMEOUT_S = 20.0  # what a worker would wait for if nobody told it
SOON_S = 10.0
# Of two, gloo lets the one with the lower address wait and the other connect: with the highest port
# it is the dead one that should connect. The place of the port in what gloo tells of an address:
PORT_AT = 20
HIGHEST_PORT = b"\xff\xff"


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroupTransport]:
    """Of rank 0 of two, not joined yet."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    transport = ProcessGroupTransport(
        rank=0,
        world_size=2,
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
        form_timeout_s=TIMEOUT_S,
    )
    yield transport
    transport.close()


@pytest.fixture
def root() -> dist.HashStore:
    """A store in this process: it has no connection that could be cut."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=TIMEOUT_S))
    return store


def test_a_peer_that_died_after_it_had_arrived_is_not_waited_for(
    transport: ProcessGroupTransport, root: dist.HashStore
) -> None:
    store = dist.PrefixStore("generation-2", root)
    store.add("arrived", 1)  # the peer, which dies now: the head tells those that are left
    transport.interrupt(2)
    with pytest.raises(TransportError, match="forming the process group was interrupted"):
        transport.join(store, generation=2)
    assert not dist.is_initialized()


def test_a_peer_that_died_before_it_connected_is_not_waited_for(
    transport: ProcessGroupTransport, root: dist.HashStore
) -> None:
    keys = [form_in_vain(transport, root, generation=number) for number in (2, 3)]
    # The next group meets under the names that a new process uses: of nothing that went before.
    assert keys == ["0//cpu//0/0"] * 2


def form_in_vain(
    transport: ProcessGroupTransport, root: dist.HashStore, *, generation: int
) -> str:
    """Let rank 0 wait for a dead peer's connection and end that; where it told its own address."""
    dead, prefix = address_of_a_dead_peer(root), f"generation-{generation}"
    store = dist.PrefixStore(prefix, root)
    store.add("arrived", 1)
    errors: list[BaseException] = []

    def join() -> None:
        try:
            transport.join(store, generation=generation)
        except TransportError as error:
            errors.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    own = wait_for_address(root, f"{prefix}/")
    root.set(own.removesuffix("0") + "1", dead[:PORT_AT] + HIGHEST_PORT + dead[PORT_AT + 2 :])
    # From here on rank 0 waits for a connection that nobody makes.
    joining.join(0.2)
    assert joining.is_alive()
    transport.interrupt(generation)
    joining.join(SOON_S)
    assert not joining.is_alive()
    assert str(errors[0]).startswith("forming the process group")
    return own.removeprefix(f"{prefix}/")


def address_of_a_dead_peer(root: dist.HashStore) -> bytes:
    """What rank 1 of a group that is gone told of where it could be reached."""
    groups: list[dist.ProcessGroupGloo] = []
    count = root.num_keys()

    def form(rank: int) -> None:
        store = dist.PrefixStore(f"dead-{count}", root)
        groups.append(dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=TIMEOUT_S)))

    threads = [threading.Thread(target=form, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return root.get(wait_for_address(root, f"dead-{count}/").removesuffix("0") + "1")


def wait_for_address(root: dist.HashStore, prefix: str) -> str:
    """The key of rank 0's address, as soon as it is there."""
    until_s = time.monotonic() + SOON_S
    while True:
        for key in root.list_keys():
            if key.startswith(prefix) and key.endswith("/0"):
                return str(key)
        assert time.monotonic() < until_s, root.list_keys()
        time.sleep(0.001)
