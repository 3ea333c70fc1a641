"""What was asked of a worker waits until all have acted on it."""

from __future__ import annotations

from deepopt.pipeline.step_result import Wish
from deepopt.worker.wishes import Wishes


def test_an_exchange_carries_all_that_waits_once() -> None:
    wishes = Wishes()
    wishes.add(Wish.STOP)
    wishes.add(Wish.CHECKPOINT)
    assert wishes.take() == Wish.STOP | Wish.CHECKPOINT
    assert wishes.take() == Wish.NONE


def test_what_the_exchange_of_a_forgotten_step_carried_waits_again() -> None:
    wishes = Wishes()
    wishes.add(Wish.STOP)
    wishes.take()
    wishes.add(Wish.LEAVE)
    wishes.put_back()
    assert wishes.waiting == Wish.STOP | Wish.LEAVE


def test_what_all_workers_know_does_not_come_again() -> None:
    wishes = Wishes()
    wishes.add(Wish.CHECKPOINT)
    wishes.take()
    wishes.settle()
    wishes.put_back()
    assert wishes.waiting == Wish.NONE
