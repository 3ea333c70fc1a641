"""Where the executor waits for a tensor: not where its receive stands, but where it is needed."""

from __future__ import annotations

from deepopt.pipeline.executor import order_waits
from deepopt.schedule.ir import parse_action


def waits(text: str) -> str:
    """The order of execution; `+` before what is only posted."""
    program = [parse_action(word) for word in text.split()]
    return " ".join("+" * slot.only_post + str(slot.action) for slot in order_waits(program))


def test_a_receive_right_before_its_need_is_waited_for_in_place() -> None:
    program = "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0"
    assert waits(program) == program


def test_receives_in_a_row_wait_for_what_comes_next_alone() -> None:
    assert waits("1RECV_B0 1RECV_F1 1F1 1B0") == "+1RECV_B0 1RECV_F1 1F1 1RECV_B0 1B0"


def test_a_receive_that_stands_before_other_work_is_waited_for_later() -> None:
    program = "1RECV_F0 1RECV_F1 1F0 1SEND_F0 1F1 1RECV_B1 1W5 1I1 1W1 1R2 1RECV_B2 1R3 1B2"
    assert waits(program) == (
        "+1RECV_F1 1RECV_F0 1F0 1SEND_F0 1RECV_F1 1F1 "
        "+1RECV_B1 1W5 1RECV_B1 1I1 1W1 1R2 +1RECV_B2 1R3 1RECV_B2 1B2"
    )


def test_what_waits_belongs_to_the_action_it_serves() -> None:
    program = [parse_action(word) for word in ["1RECV_F0", "1RECV_F1", "1F0", "1F1"]]
    assert [slot.position for slot in order_waits(program)] == [1, 2, 2, 3, 3]
