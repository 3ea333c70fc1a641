"""What a run says that nothing happens to: the same job on one worker, in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from deepopt.convert import describe
from deepopt.job_file import load_job
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.planner.decide import make_plan
from deepopt.worker.rehearsal import RankPlan


@cache
def losses_of(job_file: Path, last_step: int) -> dict[int, float]:
    """The loss of each step.

    Args:
        job_file: of the job; where it is trained on emulated devices the losses are the same.
        last_step: run through this step.
    """
    job = load_job(
        job_file,
        [
            "worker.device=cpu",
            "faults.inject=[]",
            "pipeline.placement=auto",
            "pipeline.schedule=auto",
        ],
    )
    torch.set_num_threads(job.worker.threads)  # part of the numbers
    plan = make_plan(job, describe(job), num_workers=1, plan_id=1).plan
    losses = RankPlan(0, LoneTransport(), job=job, plan=plan).run(last_step).losses
    return dict(enumerate(losses, start=1))
