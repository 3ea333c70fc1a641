from typing import Any

from deepopt.worker.mailbox import MOST_UNDER_WAY, Mailbox


class SlowHead:
    """Takes messages; answers only when told to."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.answered = 0
        self.waits: list[float] = []

    def tell(self, message: Any) -> int:
        self.taken.append(message)
        return len(self.taken)

    def wait(self, references: list[int], timeout_s: float) -> list[int]:
        self.waits.append(timeout_s)
        return [reference for reference in references if reference > self.answered]


def test_messages_go_out_in_order_without_waiting() -> None:
    head = SlowHead()
    mailbox = Mailbox(head.tell, wait=head.wait)
    for number in range(MOST_UNDER_WAY):
        mailbox.post(number)
    assert head.taken == list(range(MOST_UNDER_WAY))
    assert head.waits == []


def test_a_message_waits_for_the_oldest_once_too_many_are_under_way() -> None:
    head = SlowHead()
    mailbox = Mailbox(head.tell, wait=head.wait)
    for number in range(MOST_UNDER_WAY + 2):
        mailbox.post(number)
    assert len(head.waits) == 2
    assert head.taken[-1] == MOST_UNDER_WAY + 1


def test_signs_of_life_are_left_out_while_the_head_lags_behind() -> None:
    head = SlowHead()
    mailbox = Mailbox(head.tell, wait=head.wait)
    for _ in range(MOST_UNDER_WAY):
        mailbox.post_if_idle("beat")
    assert len(head.taken) == MOST_UNDER_WAY // 2
    assert set(head.waits) == {0.0}
    head.answered = len(head.taken)
    mailbox.post_if_idle("beat")
    assert len(head.taken) == MOST_UNDER_WAY // 2 + 1


def test_a_flush_says_whether_all_was_taken() -> None:
    head = SlowHead()
    mailbox = Mailbox(head.tell, wait=head.wait)
    mailbox.post("report")
    assert not mailbox.flush(timeout_s=1.0)
    head.answered = 1
    assert mailbox.flush(timeout_s=1.0)
    assert mailbox.flush(timeout_s=1.0)
