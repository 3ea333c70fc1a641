"""Which workers share the cores of a host, and what else takes some of these cores. Pure."""

from __future__ import annotations


def places_shared(num_workers: int, *, threads: int, cores: int) -> int | None:
    """How many workers of a host can compute at a time where these take all cores; None where some are left.

    Where each worker has its cores and none is left, they are shared as well: with the threads that bring
    messages, with Ray and with the head, for which there is no other core.

    Args:
        num_workers: of the host.
        threads: CPU threads that each of them computes with.
        cores: of the host.
    """
    places = cores // threads
    return max(1, places) if num_workers >= places else None
