"""Validation sets: the same micro-batches at each evaluation, and what cannot be evaluated."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.datasets.evaluation import evaluation_batches
from deepopt.errors import InputError


class Samples:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([float(index)]), torch.tensor(index)


class Unbounded:
    def batch(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[float(step), float(microbatch)]]), torch.tensor([0])


class Stream:
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.arange(129)])

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def make_job(**evaluation: Any) -> JobConfig:
    return JobConfig.model_validate(
        {"evaluation": evaluation, "training": {"microbatches": 4, "microbatch_size": 2}}
    )


def test_every_sample_is_evaluated_once() -> None:
    job = make_job(dataset=f"{__name__}:Samples", kwargs={"count": 23})
    batches = evaluation_batches(job, run_dir=None)
    assert batches.num_microbatches == 11
    seen = [int(x) for k in range(11) for x in batches.batch(7, k)[1]]
    assert len(set(seen)) == 22
    assert torch.equal(batches.batch(1, 5)[1], batches.batch(99, 5)[1])


def test_a_job_that_only_evaluates_leaves_no_sample_out() -> None:
    job = make_job(dataset=f"{__name__}:Samples", kwargs={"count": 23}, alone=True)
    batches = evaluation_batches(job, run_dir=None)
    assert (batches.num_microbatches, batches.last_size) == (12, 1)
    sizes = [2] * 11 + [1]
    seen = [int(x) for k, size in enumerate(sizes) for x in batches.batch(1, k)[1][:size]]
    assert sorted(seen) == list(range(23))
    few = make_job(
        dataset=f"{__name__}:Samples", kwargs={"count": 23}, alone=True, microbatches=3
    )
    batches = evaluation_batches(few, run_dir=None)
    assert (batches.num_microbatches, batches.last_size) == (3, 2)


def test_batches_of_a_users_own_are_asked_step_by_step() -> None:
    job = make_job(dataset=f"{__name__}:Unbounded", microbatches=6)
    batches = evaluation_batches(job, run_dir=None)
    assert [batches.batch(1, k)[0].tolist() for k in (0, 3, 5)] == [
        [[1.0, 0.0]],
        [[1.0, 3.0]],
        [[2.0, 1.0]],
    ]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"dataset": f"{__name__}:Stream"}, "is a stream, which cannot be read again"),
        ({"dataset": f"{__name__}:Unbounded"}, "does not say how large it is"),
        (
            {"dataset": f"{__name__}:Samples", "kwargs": {"count": 1}},
            "less than one micro-batch of 2",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(evaluation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluation_batches(make_job(**evaluation), run_dir=None)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 5}, "neither files nor a dataset"),
        ({"files": [argparse.__file__], "outputs": True}, "evaluation.alone is not"),
        ({"files": [argparse.__file__], "dataset": "a:b"}, "are both set"),
    ],
)
def test_keys_that_do_not_fit_are_refused(evaluation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_job(**evaluation)
