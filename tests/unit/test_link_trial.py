"""What a message takes at its ends, with and without what an end does between messages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from deepopt.worker import link_trial
from deepopt.worker.link_trial import num_messages, try_link


class Echo:
    """A transport whose other end answers at once."""

    rank = 0

    def __init__(self) -> None:
        self.messages: list[int] = []
        self._size = 0

    def send(self, channel: Any, message: int, tensors: Sequence[torch.Tensor]) -> None:
        self.messages.append(message)
        self._size = tensors[0].numel()

    def receive(self, channel: Any, message: int, specs: Any) -> Echo:
        return self

    def wait(self) -> tuple[torch.Tensor]:
        return (torch.zeros(self._size),)

    def finish_sends(self) -> None: ...


def times_s() -> Iterator[float]:
    """Began and ended of each round: of ten in a row, each takes longer than the one before."""
    for number in itertools.count():
        yield 100.0 * number
        yield 100.0 * number + 2.0 * (number % 10 + 1)


def tried(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> tuple[Echo, float]:
    """The transport, and the CPU time of a message of 64 bytes."""
    clock = times_s()
    monkeypatch.setattr(link_trial.time, "process_time", lambda: next(clock))
    transport: Any = Echo()
    found = try_link(
        transport,
        ranks=(0, 1),
        device=torch.device("cpu"),
        first_message=7,
        sizes_bytes=(64, 128),
        rounds=8,
        **kwargs,
    )
    return transport, found.process.seconds(64)


def test_an_end_works_between_messages_and_what_they_take_then_is_the_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    between: list[int] = []
    _, alone = tried(monkeypatch)
    transport, working = tried(monkeypatch, between=lambda: between.append(1))
    assert len(between) == 20
    assert transport.messages == list(range(7, 7 + num_messages((64, 128), rounds=8)))
    # Eight rounds took 3 to 10 s a message, the first two warmed up.
    assert alone == pytest.approx(4.25)
    assert working == pytest.approx(6.5)
