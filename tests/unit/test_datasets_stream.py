"""Streams: read in one order, asked in any, resumed where a step ended."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from deepopt.datasets.stream import StreamSource
from deepopt.errors import InputError
from support.datasets import Counter, Loader


def make_source(dataset: Any = None) -> StreamSource:
    return StreamSource(
        Counter() if dataset is None else dataset,
        microbatches=4,
        microbatch_size=2,
        sequence_length=4,
        name="data.dataset: test",
        fingerprint="f",
        description="d",
        vocab_size=None,
    )


def samples(source: StreamSource, step: int, microbatch: int) -> list[int]:
    inputs, targets = source.batch(step, microbatch)
    assert torch.equal(inputs, targets)
    assert inputs.shape == (2, 4)
    return inputs[:, 0].tolist()


def expected(step: int, microbatch: int) -> list[int]:
    first = ((step - 1) * 4 + microbatch) * 2
    return [first, first + 1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_any_order_inside_a_step_gives_the_same_batches(order: tuple[int, ...]) -> None:
    source = make_source()
    for step in (1, 2, 3):
        for microbatch in order:
            assert samples(source, step, microbatch) == expected(step, microbatch)


def test_a_replica_that_asks_for_its_share_alone_stays_aligned() -> None:
    source = make_source()
    for step in range(1, 5):
        for microbatch in (2, 3):
            assert samples(source, step, microbatch) == expected(step, microbatch)


def test_both_ends_may_ask_with_the_first_one_a_step_ahead() -> None:
    source = make_source()
    samples(source, 1, 3)
    samples(source, 2, 3)
    assert samples(source, 1, 0) == expected(1, 0)
    assert samples(source, 1, 3) == expected(1, 3)
    assert samples(source, 2, 0) == expected(2, 0)


def test_old_steps_are_let_go() -> None:
    source = make_source()
    for step in range(1, 4):
        for microbatch in range(4):
            source.batch(step, microbatch)
    with pytest.raises(AssertionError, match="step 1, micro-batch 0"):
        source.batch(1, 0)


def test_a_run_without_a_state_reads_forward_to_its_step() -> None:
    assert samples(make_source(), 50, 1) == expected(50, 1)


@pytest.mark.parametrize("dataset", [Counter, Loader])
@pytest.mark.parametrize("asked", [(0,), (3,), (0, 1, 2, 3), (2, 1)], ids=str)
def test_the_state_is_the_end_of_the_step(dataset: Any, asked: tuple[int, ...]) -> None:
    source = make_source(dataset())
    for step in (1, 2):
        for microbatch in asked:
            source.batch(step, microbatch)
    state = source.state_dict()
    assert state is not None
    assert state["step"] == 2
    assert samples(source, 2, asked[0]) == expected(2, asked[0])  # still there
    resumed = make_source(dataset())
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for step, microbatch in ((3, 1), (3, 0), (4, 2)):
        assert samples(resumed, step, microbatch) == expected(step, microbatch)
        assert samples(source, step, microbatch) == expected(step, microbatch)


def test_loading_goes_back_too() -> None:
    source = make_source()
    source.batch(1, 0)
    state = source.state_dict()
    source.batch(5, 0)
    source.load_state_dict(state)
    assert samples(source, 2, 0) == expected(2, 0)


def test_a_state_taken_before_the_first_step_is_the_start() -> None:
    state = make_source().state_dict()
    resumed = make_source()
    resumed.batch(3, 0)
    resumed.load_state_dict(state)
    assert samples(resumed, 1, 0) == expected(1, 0)


def test_a_stream_that_ends_says_where() -> None:
    source = make_source(Counter(end=11))
    source.batch(1, 3)
    with pytest.raises(InputError, match="ended in step 2, micro-batch 1") as caught:
        source.batch(2, 1)
    assert caught.value.remedy


def test_a_sample_that_does_not_fit_says_where() -> None:
    source = make_source(Counter(length=3))
    with pytest.raises(
        InputError, match=r"step 1, micro-batch 0 is torch.int64 of shape \(3,\)"
    ):
        source.batch(1, 0)


def test_a_state_that_is_not_json_is_refused_at_the_start() -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        make_source(Counter(state=torch.zeros(1)))


def test_a_stream_without_state_is_refused() -> None:
    with pytest.raises(InputError, match="could not resume"):
        make_source(iter(range(10)))
