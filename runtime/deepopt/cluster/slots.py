"""Where workers may run, and what Ray has to be told for it. No Ray here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepopt.errors import ClusterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A place for one worker.

    Args:
        host: name or address of its host, for messages.
        node_id: Ray's id of the host; None when there is but one or a bundle says it.
        bundle_index: bundle of the placement group; None without a group.
    """

    host: str
    node_id: str | None = None
    bundle_index: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """Places for the workers of a job, in the order of ranks.

    Args:
        places: one a worker.
        use_gpus: whether a worker takes a GPU; otherwise it takes a CPU slot.
        head_node_id: Ray's id of the host of supervisor and head.
        placement_group: reserved for the job in a cluster that others use too; else None.
        worker_environment: variables that workers need and do not inherit.
    """

    places: tuple[Slot, ...]
    use_gpus: bool
    head_node_id: str
    placement_group: Any = None
    worker_environment: Mapping[str, str] = field(default_factory=dict)


def check_slots(*, wanted: int, found: Mapping[str, int], what: str) -> None:
    """Check that there is room.

    Args:
        wanted: workers.
        found: slots of each host.
        what: `GPUs` or `CPU slots`.

    Raises:
        ClusterError: there is not.
    """
    total = sum(found.values())
    if total < wanted:
        hosts = ", ".join(f"{host}: {slots}" for host, slots in found.items())
        raise ClusterError(
            f"asked for {wanted} workers, found {total} {what} on {len(found)} host(s) ({hosts})",
            remedy=_remedy(total, what=what),
        )


def _remedy(total: int, *, what: str) -> str:
    if total:
        return f"lower --workers to {total}, or add hosts or slots"
    if what == "GPUs":
        return "add hosts with free GPUs, or set worker.device to cpu"
    return "add hosts with free slots"
