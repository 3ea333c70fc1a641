"""Which workers of a host measure at the same moment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepopt.worker.company import workers_at_once
from deepopt.worker.profile_worker import turns_of


@given(count=st.integers(1, 40), at_once=st.integers(1, 40))
def test_each_turn_has_as_many_workers_as_may_measure_at_once(count: int, at_once: int) -> None:
    turns = [turns_of(position, count=count, at_once=at_once) for position in range(count)]
    together = min(count, at_once)
    last = max(max(own) for own in turns)
    assert last + 1 == -(-count // together)
    assert all(turns)
    # Of a worker that measures twice the later one counts, and that one has company as well.
    assert all(sum(turn in own for own in turns) == together for turn in range(last + 1))


def test_workers_without_a_core_for_each_measure_in_pairs_and_the_odd_one_has_company() -> None:
    turns = [sorted(turns_of(position, count=3, at_once=2)) for position in range(3)]
    assert turns == [[0], [0, 1], [1]]


def test_workers_measure_together_where_only_their_own_cpu_time_counts() -> None:
    assert workers_at_once(6, cores=2, threads=1) == 6
    assert workers_at_once(6, cores=8, threads=2) == 4  # wall time: each needs its cores
    assert workers_at_once(6, cores=2, threads=4) == 1
