"""`BiStreamPipeline` in processes that a script started: outputs and gradients of the model by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from support.own_loops import (
    MICROBATCHES,
    SAMPLES,
    make_batch,
    make_model,
    mean_square,
    own_loop,
    plain,
    run_ranks,
    tied_loop,
    two_seeds,
)

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_passes_and_steps_have_the_bits_of_the_model_by_itself(
    world_size: int, tmp_path: Path
) -> None:
    ranks = run_ranks(own_loop, world_size=world_size, folder=tmp_path)
    _, targets = make_batch()
    chunks = targets.chunk(MICROBATCHES)
    losses: list[float] = []

    def scaled(output: torch.Tensor, number: int) -> torch.Tensor:
        loss = mean_square(output, chunks[number])
        losses.append(loss.item())
        return loss / MICROBATCHES

    outputs, passed = plain(loss=lambda output, number: (output * chunks[number]).sum())
    _, stepped = plain(loss=scaled)
    size = SAMPLES // MICROBATCHES
    assert ranks[-1]["where"] == slice(0, 2 * size)
    assert ranks[0]["where"] == slice(2 * size, SAMPLES)
    seen: set[str] = set()
    for rank in ranks:
        where = rank["where"]
        assert (where is None) == (rank["output"] is None)
        if where is not None:
            assert torch.equal(rank["output"], outputs[where])
        for name, grad in rank["once"].items():
            assert torch.equal(grad, passed[name]), name
            assert torch.equal(rank["twice"][name], 2 * passed[name]), name
            assert torch.equal(rank["step"][name], stepped[name]), name
            start = make_model().get_parameter(name).detach()
            assert torch.equal(
                rank["state"][name], torch.add(start, stepped[name], alpha=-0.1)
            ), name
            seen.add(name)
        assert rank["loss"] == pytest.approx(sum(losses) / MICROBATCHES, rel=1e-12)
        assert rank["kept"], "the script's random numbers are its own"
    assert seen == set(passed)


@pytest.mark.parametrize(
    ("stages", "world_size", "defer_weights"),
    [((0, 1, 2), 3, True), ((0, 2), 4, False)],
    ids=["three stages, weights deferred", "two replicas of two stages"],
)
def test_tied_weights_routers_and_replicas_have_the_bits_of_one_process(
    stages: tuple[int, ...], world_size: int, defer_weights: bool, tmp_path: Path
) -> None:
    whole = tied_loop(0, 1, stages=stages)
    ranks = run_ranks(
        partial(tied_loop, stages=stages, defer_weights=defer_weights),
        world_size=world_size,
        folder=tmp_path,
    )
    assert ranks[0]["defers"] == defer_weights
    seen: set[str] = set()
    for rank in ranks:
        assert rank["losses"] == whole["losses"]
        assert rank["is_tied"]
        for name, grad in rank["grads"].items():
            assert torch.equal(grad, whole["grads"][name]), name
        for name, value in rank["state"].items():
            assert torch.equal(value, whole["state"][name]), name
        seen |= rank["state"].keys()
    assert seen == whole["state"].keys()
    if (
        len(stages) == 3
    ):  # the one in the middle has the second use of a norm, under its first name
        assert "1.norm.weight" in ranks[1]["grads"]


def test_other_weights_and_too_few_processes_are_told_on_all_ranks(tmp_path: Path) -> None:
    for rank in run_ranks(two_seeds, world_size=2, folder=tmp_path):
        different, too_few = rank["said"]
        assert "stage 0 begins with different weights on ranks 0 and 1" in different
        assert (
            "3 stages need a multiple of 3 processes, or 1 that holds them all; there are 2"
            in too_few
        )


def test_the_documented_script_runs_under_torchrun(tmp_path: Path) -> None:
    _, _, section = DOCS.read_text().partition("## A loop of your own")
    match = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert match is not None
    (tmp_path / "loop.py").write_text(match[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "loop.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    losses = re.findall(r"loss (\d\.\d{4})", result.stdout)
    assert len(losses) == 2
    assert losses[0] == losses[1], "every rank knows the loss of the whole batch"
