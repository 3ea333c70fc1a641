"""A step over several ranks has the bits of one alone: exchanges, tied weights, routers, updates that are
taken back. Over processes and sockets: tests/process."""

from __future__ import annotations

from typing import Any

import pytest

from deepopt.config import JobConfig
from support.ranks_as_threads import train_in_threads
from support.worker_processes import make_plan, tiny_job

STEPS = 5
CLIP_STEP_4 = 3.0  # with so high a learning rate the norm first jumps above it in step 4
MIRROR = {
    "placement": "mirror",
    "schedule": "bi_stream",
    "boundaries": (0, 2, 4, 6),
    "pipeline_size": 4,
}
PLACES = [
    pytest.param(MIRROR, id="mirror-4"),
    pytest.param(
        {
            **MIRROR,
            "boundaries": (0, 3),
            "pipeline_size": 2,
            "data_size": 2,
            "num_groups": 4,
        },
        id="mirror-2x2",  # four holders of a stage: sums in parts
    ),
]


def job_of(*, overlap: bool) -> JobConfig:
    return tiny_job(
        training={"grad_clip": CLIP_STEP_4, "microbatches": 4, "microbatch_size": 1},
        optimizer={"learning_rate": 0.1},
        pipeline={"overlap_steps": overlap},
    )


@pytest.mark.parametrize("where", PLACES)
def test_copies_of_a_stage_give_the_bits_of_one(where: dict[str, Any]) -> None:
    groups = {"num_groups": where.get("num_groups", 2)}
    job = job_of(overlap=False)
    alone = train_in_threads(job, make_plan(job, **groups), num_steps=STEPS)[0]
    waiting = train_in_threads(job, make_plan(job, **where), num_steps=STEPS)
    eager = job_of(overlap=True)
    ahead = train_in_threads(eager, make_plan(eager, **where), num_steps=STEPS, overlap=True)
    for results in (*waiting.values(), *ahead.values()):
        assert [(r.loss, r.grad_norm) for r in results] == [
            (r.loss, r.grad_norm) for r in alone
        ]
    assert [r.ran_ahead for r in ahead[0]] == [False, True, True, True, False]
    assert [r.clipped for r in alone] == [r.rolled_back for r in ahead[0]]
    assert any(r.clipped for r in alone)
