"""Where the executor waits for a tensor: not where its receive stands, but where it is needed."""

from __future__ import annotations

from deepopt.pipeline.executor import late_waits
from deepopt.schedule.ir import parse_action


def waits(text: str) -> dict[str, str]:
    program = [parse_action(word) for word in text.split()]
    return {
        str(receive): str(program[index])
        for index, receives in late_waits(program).items()
        for receive in receives
    }


def test_a_receive_right_before_its_need_is_waited_for_in_place() -> None:
    assert waits("1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0") == {}


def test_receives_in_a_row_are_waited_for_in_place() -> None:
    assert waits("1RECV_B0 1RECV_F1 1F1") == {}


def test_a_receive_that_stands_before_other_work_is_waited_for_later() -> None:
    found = waits("1RECV_F0 1RECV_F1 1F0 1SEND_F0 1F1 1RECV_B1 1W5 1I1 1R2 1RECV_B2 1R3 1B2")
    assert found == {"1RECV_F1": "1F1", "1RECV_B1": "1I1", "1RECV_B2": "1B2"}
