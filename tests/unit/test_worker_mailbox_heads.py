"""A mailbox whose head dies: nothing that matters is lost, and the order stays."""

from __future__ import annotations

from typing import Any

from deepopt.worker.mailbox import MOST_UNDER_WAY, Mailbox


class MortalHead:
    """Takes messages at once until it dies; then every call fails."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.dead = False

    def tell(self, message: Any) -> bool:
        if not self.dead:
            self.taken.append(message)
        return not self.dead


def make(head: MortalHead) -> Mailbox:
    return Mailbox(head.tell, wait=lambda references, timeout_s: [], was_taken=bool)


def test_what_a_dead_head_did_not_take_goes_to_the_next_one_in_order() -> None:
    first, second = MortalHead(), MortalHead()
    mailbox = make(first)
    mailbox.post("step 1")
    assert mailbox.flush(timeout_s=1.0)
    first.dead = True
    for number in range(2, 3 * MOST_UNDER_WAY):
        mailbox.post(f"step {number}")
        mailbox.post_if_idle("beat")
    assert not mailbox.flush(timeout_s=1.0)
    mailbox.redirect(second.tell)
    assert second.taken == [f"step {number}" for number in range(2, 3 * MOST_UNDER_WAY)]
    mailbox.post("last")
    assert second.taken[-1] == "last"
    assert mailbox.flush(timeout_s=1.0)


def test_what_may_have_been_taken_is_sent_again() -> None:
    first, second = MortalHead(), MortalHead()
    mailbox = make(first)
    mailbox.post("step 1")
    mailbox.post_if_idle("beat")
    mailbox.redirect(second.tell)
    assert second.taken == ["step 1"]
