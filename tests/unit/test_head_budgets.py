from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.config import FaultsConfig
from deepopt.head.budgets import (
    BACKOFF_MOST_S,
    Budget,
    Spent,
    backoff_s,
    bad_hosts,
    budget_of,
    count,
    limits_of,
    spent_of,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def spent(at_s: float = 0.0, *, step: int = 0, host: str = "") -> Spent:
    return Spent(budget=Budget.WORKER, at_s=at_s, step_done=step, host=host)


def test_the_limits_are_those_of_the_job() -> None:
    limits = limits_of(FaultsConfig(max_restarts=7, max_head_restarts=2, window_s=60.0))
    assert (limits.most[Budget.WORKER], limits.most[Budget.HEAD], limits.window_s) == (7, 2, 60)
    assert set(limits.most) == set(Budget)


@pytest.mark.parametrize(
    ("cause", "preempted", "budget"),
    [
        ("head", False, Budget.HEAD),
        ("unreachable", False, Budget.HOST),
        ("exit", True, Budget.PREEMPTION),
        ("held_gil", False, Budget.WORKER),
    ],
)
def test_a_fault_is_counted_as_what_it_is(cause: str, preempted: bool, budget: Budget) -> None:
    assert budget_of(cause, preempted=preempted) is budget


@given(ages_s=st.lists(st.floats(0, 200)), window_s=st.floats(1, 100))
def test_only_faults_within_the_window_count(ages_s: list[float], window_s: float) -> None:
    faults = [spent(1000.0 - age_s) for age_s in ages_s]
    counted = count(faults, Budget.WORKER, now_s=1000.0, window_s=window_s)
    assert counted == sum(1000.0 - one.at_s < window_s for one in faults)
    assert count(faults, Budget.HOST, now_s=1000.0, window_s=window_s) == 0


def test_only_a_recovery_that_brought_no_step_makes_the_next_one_wait() -> None:
    assert backoff_s([], step_done=0) == 0.0
    assert backoff_s([spent(step=3), spent(step=5)], step_done=6) == 0.0
    assert backoff_s([spent(step=5), spent(step=6)], step_done=6) == 0.0
    assert backoff_s([spent(step=6)] * 2, step_done=6) == 1.0
    assert backoff_s([spent(step=6)] * 4, step_done=6) == 4.0
    assert backoff_s([spent(step=6)] * 99, step_done=6) == BACKOFF_MOST_S


def test_bad_hosts_are_forgiven_after_the_window() -> None:
    limits = limits_of(FaultsConfig(bad_host_after=2, window_s=100.0))
    faults = [spent(0.0, host="a"), spent(50.0, host="a"), spent(50.0, host="b"), spent(60.0)]
    assert bad_hosts(faults, limits=limits, now_s=60.0) == ("a",)
    assert bad_hosts(faults, limits=limits, now_s=100.0) == ()


@pytest.mark.parametrize(("age_s", "at_s"), [(30.0, 970.0), (-3600.0, 1000.0)])
def test_ages_come_from_the_journal_and_a_clock_set_back_does_no_harm(
    age_s: float, at_s: float
) -> None:
    fault = {
        "budget": "host",
        "time": (NOW - timedelta(seconds=age_s)).isoformat(),
        "step_done": 4,
        "culprit": {"host": "a"},
    }
    ended = {"budget": "", "time": NOW.isoformat()}
    assert spent_of([fault, ended], now_s=1000.0, now=NOW) == [
        Spent(budget=Budget.HOST, at_s=at_s, step_done=4, host="a")
    ]
