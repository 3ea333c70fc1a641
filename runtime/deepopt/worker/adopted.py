"""What a head and a worker that it has not started say to each other when the head before has died."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepopt.worker.messages import Failure, RunEnded, Sender, WeightWork, WorkerReady


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where a worker's process is.

    Args:
        pid: process id on its host.
        host: host name.
        node_id: Ray's id of the host.
        gpus: ids of the GPUs that Ray gave it.
    """

    pid: int
    host: str
    node_id: str
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHead:
    """A head that takes over.

    Args:
        handle: of its actor.
        store_host: IP address of its store.
        store_port: its port.
    """

    handle: Any
    store_host: str
    store_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """What a worker is doing, for a head that has not started it.

    Args:
        whereabouts: its process.
        sender: the identity that it was given last; None before the first.
        start_step: steps done when its generation began.
        ready: its word that it was set up; None before.
        ended: how its run ended; None while it runs.
        weight_work: what it has told of weight gradients; None before.
    """

    whereabouts: Whereabouts
    sender: Sender | None = None
    start_step: int = 0
    ready: WorkerReady | None = None
    ended: RunEnded | Failure | None = None
    weight_work: WeightWork | None = None
