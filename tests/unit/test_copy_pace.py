"""How often copies for peers may be made."""

from __future__ import annotations

from deepopt.worker.copy_pace import FIRST_COPIES, CopyPace


def pace_after(*took_s: float, share: float = 0.02) -> CopyPace:
    """A pace that has seen copies, the last of which ended at 0 s."""
    pace = CopyPace(share=share)
    for one_s in took_s:
        pace.made(took_s=one_s, now_s=0.0)
    return pace


def test_the_first_copies_do_not_rest_however_long_they_take() -> None:
    assert not pace_after(*[100.0] * (FIRST_COPIES - 1)).rests(now_s=0.0)
    assert pace_after(*[100.0] * FIRST_COPIES).rests(now_s=0.0)


def test_copies_take_their_share_of_the_time_and_no_more() -> None:
    pace = pace_after(*[0.25] * FIRST_COPIES, share=0.25)
    assert pace.rests(now_s=0.7)  # 0.25 of every 1 s
    assert not pace.rests(now_s=0.75)


def test_a_copy_that_waited_for_a_core_does_not_make_the_next_one_late() -> None:
    pace = pace_after(0.01, *[3.0] * FIRST_COPIES)
    assert pace.rests(now_s=0.4)
    assert not pace.rests(now_s=0.5)


def test_copies_that_all_take_longer_become_rarer() -> None:
    pace = pace_after(0.01, *[1.0] * 8)
    assert pace.rests(now_s=40.0)
