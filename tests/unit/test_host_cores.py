"""Who shares the cores of a host."""

import pytest

from deepopt.planner.host_cores import places_shared


@pytest.mark.parametrize(
    ("workers", "threads", "cores", "places"),
    [
        (4, 1, 2, 2),
        (2, 1, 2, 2),  # none is left for messages, Ray and the head
        (1, 1, 2, None),
        (2, 4, 8, 2),
        (2, 3, 8, 2),
        (1, 3, 8, None),
        (3, 4, 2, 1),  # more threads than cores: one at a time
    ],
)
def test_cores_are_shared_where_the_workers_leave_none(
    workers: int, threads: int, cores: int, places: int | None
) -> None:
    assert places_shared(workers, threads=threads, cores=cores) == places
