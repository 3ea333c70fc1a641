"""A step whose numbers are bad: the job ends, or leaves it out, or computes it again."""

from __future__ import annotations

import math

import pytest
import torch

from deepopt.errors import TrainingError
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.stage_experts import RouterFigures, count_bad_scores
from deepopt.pipeline.step import PipelineStep
from support.lone_step import Cut, job_of, make_step, state_of

BAD = 3


def spoil(step: PipelineStep, *, times: int) -> None:
    """Let the third layer give a NaN in so many forwards from step `BAD` on."""
    name = list(step.optimizers)[2]
    left = [times]

    def hook(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        stage = step._stages[0]
        if stage._step < BAD or not left[0]:
            return None
        left[0] -= 1
        return output * float("nan")

    step.optimizers[name].layer.module.register_forward_hook(hook)


def run(step: PipelineStep, steps: range, *, overlap: bool = False) -> list[float]:
    return [step.run(n, go_on=overlap and n < steps[-1]).loss for n in steps]


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_a_step_computed_again_changes_no_bit(overlap: bool) -> None:
    again = {"faults": {"bad_step": "recompute"}}
    twin = make_step(job_of(overlap=False), LoneTransport())
    step = make_step(job_of(overlap=overlap, **again), Cut() if overlap else LoneTransport())
    spoil(step, times=1)
    assert run(step, range(1, 6), overlap=overlap) == run(twin, range(1, 6))
    for key, value in state_of(step).items():
        assert torch.equal(value, state_of(twin)[key]), key


def test_what_was_wrong_is_told_of_a_step_computed_again() -> None:
    step = make_step(job_of(overlap=False, faults={"bad_step": "recompute"}), LoneTransport())
    spoil(step, times=1)
    run(step, range(1, BAD))
    result = step.run(BAD)
    assert result.bad is not None
    assert "the loss of micro-batch 0 is nan" in result.bad.what
    assert not result.skipped
    assert math.isfinite(result.loss)
    assert step.run(BAD + 1).bad is None


def test_a_step_that_is_bad_twice_ends_the_job_and_names_layer_and_rank() -> None:
    step = make_step(job_of(overlap=False, faults={"bad_step": "recompute"}), LoneTransport())
    spoil(step, times=100)
    run(step, range(1, BAD))
    name = list(step.optimizers)[2]
    with pytest.raises(TrainingError, match=f"output of layer {name} on rank 0") as caught:
        step.run(BAD)
    assert "computing the step again came out bad as well" in caught.value.message


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_a_step_left_out_leaves_weights_and_moments_alone(overlap: bool) -> None:
    job = job_of(overlap=overlap, faults={"bad_step": "skip"})
    step = make_step(job, Cut() if overlap else LoneTransport())
    spoil(step, times=2)
    run(step, range(1, BAD), overlap=overlap)
    before = state_of(step) if not overlap else None
    result = step.run(BAD, go_on=overlap)
    assert result.skipped
    assert step.version == BAD
    if before is not None:
        assert all(torch.equal(v, before[k]) for k, v in state_of(step).items())
    assert all(bool(v.isfinite().all()) for v in state_of(step).values())
    assert math.isfinite(step.run(BAD + 1).loss)


def test_by_default_bad_numbers_end_the_job() -> None:
    step = make_step(job_of(overlap=False), LoneTransport())
    spoil(step, times=1)
    run(step, range(1, BAD))
    before = state_of(step)
    with pytest.raises(TrainingError, match="the loss of micro-batch 0 is nan"):
        step.run(BAD)
    assert all(torch.equal(v, before[k]) for k, v in state_of(step).items())


def test_a_norm_above_the_limit_is_bad() -> None:
    job = job_of(overlap=False, faults={"bad_step": "skip", "norm_limit": 1e-3})
    step = make_step(job, LoneTransport())
    result = step.run(1)
    assert result.skipped
    assert result.bad is not None
    assert "above faults.norm_limit (0.001)" in result.bad.what


def test_scores_that_are_not_finite_are_counted_and_no_other_figure_of_a_router() -> None:
    figures = dict.fromkeys(RouterFigures.__slots__, 7.0)
    rows = [RouterFigures(**{**figures, "bad": bad}).row() for bad in (0.0, 3.0)]
    assert count_bad_scores(rows) == 3
