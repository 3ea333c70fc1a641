"""Lines through times of messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.planner.alpha_beta import fit

SIZES = [1e3, 1e4, 1e5, 1e6]


@given(alpha=st.floats(1e-6, 1e-2), beta=st.floats(1e-12, 1e-7))
def test_points_on_a_line_give_the_line(alpha: float, beta: float) -> None:
    found = fit(SIZES, times_s=[alpha + size * beta for size in SIZES])
    assert found.seconds(5e5) == pytest.approx(alpha + 5e5 * beta, rel=1e-6)
    assert found.error < 1e-6


@given(times=st.lists(st.floats(1e-7, 1.0), min_size=4, max_size=4))
def test_no_part_is_negative_and_the_error_is_that_of_the_worst_point(
    times: list[float],
) -> None:
    found = fit(SIZES, times_s=times)
    assert found.alpha_s >= 0
    assert found.beta_s >= 0
    worst = max(abs(found.seconds(s) - t) / t for s, t in zip(SIZES, times, strict=True))
    assert found.error == pytest.approx(worst)


def test_a_rate_that_does_not_show_is_none() -> None:
    assert fit([1.0, 2.0], times_s=[3.0, 3.0]).bytes_per_s is None


def test_one_size_shows_no_rate() -> None:
    with pytest.raises(PlanError, match="1 size"):
        fit([5.0, 5.0], times_s=[1.0, 2.0])
