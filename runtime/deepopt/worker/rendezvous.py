"""How the workers of a generation find each other: one TCPStore in the head, one prefix a
generation."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from datetime import timedelta
from typing import cast

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from deepopt.errors import ClusterError, TransportError
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.process_group import ProcessGroupTransport
from deepopt.pipeline.same_host_transport import SameHostTransport
from deepopt.pipeline.transport import Store, Transport
from deepopt.worker.beats import BeatStore
from deepopt.worker.messages import Assignment, Sender

_BEAT_CONNECT_TIMEOUT = timedelta(seconds=2.0)
_SIOCGIFADDR = 0x8915  # Linux: get the IPv4 address of an interface


class StoreServer:
    """The store of one job; lives in the head, so that no worker's death takes it away.

    Args:
        host: IP address that workers reach the head by.

    Raises:
        ClusterError: no port could be opened on that address.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        try:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise ClusterError(
                f"cannot open a rendezvous store on {host}: {str(error).splitlines()[0]}",
                remedy="check that the address belongs to this host",
            ) from error
        self.port = int(self._store.port)

    def beats_of(self, job_id: str, generation: int) -> BeatStore:
        """Where the workers of a generation leave their signs of life.

        Args:
            job_id: the job.
            generation: which.
        """
        return _as_beat_store(PrefixStore(_prefix(job_id, generation), self._store))


def serve_store(host: str) -> StoreServer:
    """Open the store of a job on an address of this host, on a free port."""
    return StoreServer(host)


def make_transport(assignment: Assignment, *, device: torch.device) -> Transport:
    """The transport of a worker, which has not joined its group yet.

    Args:
        assignment: names the rank and the world.
        device: where tensors live.
    """
    if assignment.plan.world_size == 1:
        return LoneTransport()
    interface = interface_of(assignment.node_ip)
    if (
        interface is not None
    ):  # without it gloo looks the host's name up, which may be any address
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = interface
    return transport_of_group(
        rank=assignment.sender.rank,
        world_size=assignment.plan.world_size,
        device=device,
        timeout_s=assignment.job.pipeline.timeout_s,
        form_timeout_s=assignment.job.faults.setup_timeout_s,
        same_host=assignment.job.pipeline.same_host,
    )


def transport_of_group(
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout_s: float,
    form_timeout_s: float,
    same_host: str = "shared_memory",
) -> Transport:
    """The transport of one of several workers, which has not joined its group yet.

    Args:
        rank: of the worker.
        world_size: workers of the group.
        device: where tensors live.
        timeout_s: longest wait for a peer, in seconds.
        form_timeout_s: longest forming of the group, in seconds.
        same_host: `pipeline.same_host`; alike for all of the group.
    """
    sockets = ProcessGroupTransport(
        rank=rank,
        world_size=world_size,
        device=device,
        timeout_s=timeout_s,
        form_timeout_s=form_timeout_s,
    )
    if same_host == "sockets":
        return sockets
    return SameHostTransport(
        sockets, device=device, timeout_s=timeout_s, form_timeout_s=form_timeout_s
    )


def join(assignment: Assignment, *, device: torch.device) -> Transport:
    """Join the group of an assignment's generation; blocks until all workers are there.

    Args:
        assignment: names the store, the rank and the generation.
        device: where tensors live.

    Raises:
        TransportError: the store or a peer did not answer in time.
    """
    transport = make_transport(assignment, device=device)
    transport.join(open_store(assignment), generation=assignment.sender.generation)
    return transport


def open_store(assignment: Assignment, *, generation: int | None = None) -> Store:
    """A connection of its own to the job's store, prefixed with a generation.

    Args:
        assignment: names the store.
        generation: which; None for the assignment's own.

    Raises:
        TransportError: the store did not answer in time.
    """
    sender = assignment.sender
    try:
        store = TCPStore(
            assignment.store_host,
            assignment.store_port,
            is_master=False,
            timeout=timedelta(seconds=assignment.job.faults.setup_timeout_s),
        )
    except RuntimeError as error:
        raise TransportError(
            f"rank {sender.rank} cannot reach the store of the head at "
            f"{assignment.store_host}:{assignment.store_port}: {str(error).splitlines()[0]}",
            remedy="check that the hosts reach each other on this address",
        ) from error
    number = sender.generation if generation is None else generation
    return PrefixStore(_prefix(sender.job_id, number), store)


def open_beat_store(address: tuple[str, int], sender: Sender) -> BeatStore:
    """A connection for signs of life; gives up soon, because none is sent meanwhile.

    Args:
        address: IP address and port of the store.
        sender: whose.

    Raises:
        RuntimeError: the store did not answer in time.
    """
    store = TCPStore(*address, is_master=False, timeout=_BEAT_CONNECT_TIMEOUT)
    return _as_beat_store(PrefixStore(_prefix(sender.job_id, sender.generation), store))


def _as_beat_store(store: Store) -> BeatStore:
    return cast("BeatStore", store)  # its annotations lack two methods


def _prefix(job_id: str, generation: int) -> str:
    return f"{job_id}/generation-{generation}"


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, for example `lo` for 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
