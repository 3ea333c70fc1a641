"""Whether to bet that the next step is not clipped."""

from __future__ import annotations

from deepopt.pipeline.clip_forecast import ClipForecast


def after(*clipped: bool) -> ClipForecast:
    forecast = ClipForecast()
    for one in clipped:
        forecast = forecast.after(clipped=one)
    return forecast


def test_nothing_is_bet_on_before_the_first_step() -> None:
    assert not ClipForecast().is_unlikely
    assert after(False).is_unlikely
    assert not after(True).is_unlikely


def test_one_clipped_step_among_many_does_not_end_the_bets() -> None:
    assert after(*[False] * 5, True).is_unlikely
    assert not after(*[False] * 5, True, True, True).is_unlikely


def test_bets_return_when_clipping_has_ended() -> None:
    assert not after(*[True] * 20, *[False] * 13).is_unlikely
    assert after(*[True] * 20, *[False] * 14).is_unlikely
