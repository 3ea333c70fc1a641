"""How far an evaluation is can be asked from another thread while it computes."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from deepopt.datasets.evaluation import evaluation_batches
from deepopt.pipeline.lone_transport import LoneTransport
from support.lone_step import job_of, make_step


def test_an_evaluation_tells_the_micro_batch_it_is_in_and_how_many_there_are() -> None:
    job = job_of(
        overlap=False, evaluation={"files": [argparse.__file__], "every": 2, "microbatches": 3}
    )
    step = make_step(job, LoneTransport())
    evaluator = step.make_evaluator(evaluation_batches(job, run_dir=None), num_microbatches=3)
    seen: list[tuple[int, int] | None] = [evaluator.progress()]

    def look(microbatch: int, output: torch.Tensor, targets: torch.Tensor) -> tuple[Any, Any]:
        seen.append(evaluator.progress())
        return output, targets

    evaluator.run(cut=look)
    seen.append(evaluator.progress())
    assert seen == [None, (1, 3), (2, 3), (3, 3), None]
