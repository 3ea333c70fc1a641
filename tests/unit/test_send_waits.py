"""Waits for sends end when they are told to, whatever the backend does."""

from __future__ import annotations

import threading

import pytest

from deepopt.errors import TransportError
from deepopt.pipeline.send_waits import SendWaits


class Stuck:
    """A send that the backend has lost."""

    def __init__(self) -> None:
        self.is_waited_for = threading.Event()
        self.may_go = threading.Event()

    def wait(self) -> None:
        self.is_waited_for.set()
        self.may_go.wait(60)


class Failing:
    def wait(self) -> None:
        raise RuntimeError("connection reset")


def test_a_lost_send_is_no_longer_waited_for_when_the_group_has_ended() -> None:
    waits, lost = SendWaits(), Stuck()

    def end() -> None:
        lost.is_waited_for.wait(60)
        waits.end()

    threading.Thread(target=end).start()
    with pytest.raises(TransportError, match="a send was interrupted"):
        waits.wait([lost], "a send")
    with pytest.raises(TransportError, match="interrupted"):
        waits.wait([lost], "a send after the end")
    lost.may_go.set()
    waits.begin()
    waits.wait([lost], "a send of the next group")


def test_what_the_backend_says_is_raised_where_it_is_waited_for() -> None:
    with pytest.raises(RuntimeError, match="connection reset"):
        SendWaits().wait([Failing()], "a send")


def test_one_wait_after_the_other_takes_one_thread_which_ends_at_the_close() -> None:
    waits, names = SendWaits(), set[threading.Thread]()

    class Noting:
        def wait(self) -> None:
            names.add(threading.current_thread())

    for _ in range(3):
        waits.wait([Noting()], "a send")
    (thread,) = names
    waits.close()
    thread.join(60)
    assert not thread.is_alive()
