import pytest

from deepopt.errors import DeepoptError
from deepopt.head.state import ENDED, LEGAL, JobState, advance


def test_every_state_has_a_row_and_no_state_leads_to_itself() -> None:
    assert set(LEGAL) == set(JobState)
    assert all(state not in LEGAL[state] for state in JobState)


@pytest.mark.parametrize("state", sorted(JobState))
def test_a_transition_is_allowed_exactly_where_the_table_says_so(state: JobState) -> None:
    for to in JobState:
        if to in LEGAL[state]:
            assert advance(state, to) is to
        else:
            with pytest.raises(DeepoptError, match=f"cannot go from {state} to {to}"):
                advance(state, to)


def test_an_ended_job_can_only_start_again() -> None:
    assert all(LEGAL[state] == {JobState.STARTING} for state in ENDED)


def test_every_state_that_has_not_ended_can_fail_and_stop() -> None:
    for state in set(JobState) - ENDED:
        assert {JobState.FAILED, JobState.STOPPED} <= LEGAL[state]
