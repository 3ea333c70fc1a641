"""Real workers that a job slows: the same numbers, in more CPU time."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepopt.config import JobConfig
from support.worker_processes import make_plan, tiny_job, train

FACTOR = 4.0


def test_a_slowed_worker_takes_its_factor_and_has_the_same_bits(tmp_path: Path) -> None:
    plain = tiny_job()
    plan = make_plan(plain, boundaries=(0, 4), pipeline_size=2)
    slowed = JobConfig.model_validate(
        {**plain.model_dump(by_alias=True), "emulation": {"rank_factor": [1.0, FACTOR]}}
    )
    runs = {
        name: train(job, plan, run_dir=tmp_path / name, last_step=4)
        for name, job in {"plain": plain, "slowed": slowed}.items()
    }
    assert not any(run.failures for run in runs.values())
    assert runs["slowed"].losses == runs["plain"].losses
    times = {
        name: [sum(run.ended[rank].op_times_s.values()) for rank in (0, 1)]
        for name, run in runs.items()
    }
    first, second = (
        after / before for before, after in zip(times["plain"], times["slowed"], strict=True)
    )
    # CPU times scatter beside other programs: half of the factor is far above that.
    assert second / first == pytest.approx(FACTOR, rel=0.5)
