"""Processes that read ahead: what they read, what they say of errors, and that they end with their worker."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.order import sample_index
from deepopt.datasets.read_ahead import ReadAhead, with_readers
from deepopt.errors import TrainingError
from support.forking import fork_context
from support.read_datasets import BROKEN
from support.worker_processes import make_plan, tiny_job, train

_ORDER = (0, 1, 2, 1)  # of 4 micro-batches of a step, the last one is not this worker's
_TIMEOUT_S = 60.0


def job(*, readers: int = 1, **kwargs: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "data": {
                "dataset": "support.read_datasets:Marked",
                "kwargs": kwargs,
                "readers": readers,
            },
            "training": {"microbatches": 4, "microbatch_size": 1},
        }
    )


def read_ahead(wanted: JobConfig) -> ReadAhead:
    source = build_batch_source(wanted, run_dir=None)
    ahead = with_readers(source, job=wanted, run_dir=None)
    assert isinstance(ahead, ReadAhead)
    return ahead


@pytest.fixture
def two_readers() -> Iterator[ReadAhead]:
    ahead = read_ahead(job(readers=2))
    yield ahead
    ahead.close()


def place_of(sample: int) -> tuple[int, int]:
    """Step and micro-batch that a sample comes in first."""
    seed = job().training.seed
    position = next(
        p for p in range(16) if sample_index(p, num_samples=16, seed=seed) == sample
    )
    return 1 + position // 4, position % 4


def test_other_processes_read_the_same_and_say_which_sample_broke(
    two_readers: ReadAhead,
) -> None:
    source = build_batch_source(job(), run_dir=None)
    broken = place_of(BROKEN)
    order = [m for m in _ORDER if m != broken[1]]
    two_readers.expect(order, step=1)
    pids: set[float] = set()
    for step in (1, 2, 3, 2):  # and back, as after a fault
        for microbatch in order:
            inputs, pid = two_readers.batch(step, microbatch)
            assert torch.equal(inputs, source.batch(step, microbatch)[0])
            pids.add(pid.item())
    assert len(pids) == 2
    assert os.getpid() not in pids
    with pytest.raises(
        TrainingError, match=rf"sample {BROKEN}: ValueError: broken \(.*read_datasets\.py:\d+\)"
    ) as failed:
        two_readers.batch(*broken)
    assert "in __getitem__" in str(failed.value.__cause__)
    assert two_readers.batch(1, order[0])[0].shape == (1, 1), "the readers go on"


def test_a_reader_that_dies_is_named() -> None:
    step, microbatch = place_of(7)
    ahead = read_ahead(job(exits=7))
    ahead.expect([microbatch], step=step)
    with pytest.raises(
        TrainingError,
        match=rf"reader 0 \(pid \d+\) ended with exit code 3 before it had read step {step}, "
        f"micro-batch {microbatch}",
    ):
        ahead.batch(step, microbatch)
    ahead.close()


def test_a_job_has_the_same_losses_when_its_data_are_read_ahead(tmp_path: Path) -> None:
    def run(readers: int) -> tuple[list[float], list[Any], set[str]]:
        folder = tmp_path / str(readers)
        folder.mkdir()
        read = {
            "dataset": "support.read_datasets:Bytes",
            "kwargs": {"folder": str(folder), "size": 2, "length": 16},
            "readers": readers,
        }
        wanted = tiny_job(
            data={**read, "sequence_length": 16, "files": []},
            evaluation={**read, "every": 2},
            training={"microbatches": 4, "microbatch_size": 2},
        )
        plan = make_plan(
            wanted, placement="mirror", schedule="bi_stream", boundaries=(0, 3), pipeline_size=2
        )
        outcome = train(wanted, plan, run_dir=folder / "run", last_step=3)
        assert not outcome.failures, outcome.failures
        validated = [report.scalars.get("val_loss") for report in outcome.reports]
        return outcome.losses, validated, {path.name for path in folder.iterdir()} - {"run"}

    losses, validated, who = run(1)
    assert who == {"reader"}
    assert run(0) == (losses, validated, {"worker"})


def _hang(folder: str) -> None:
    step, microbatch = place_of(7)
    ahead = read_ahead(job(folder=folder, hangs=7))
    ahead.expect([microbatch], step=step)
    ahead.batch(step, microbatch)


def test_a_reader_ends_with_a_worker_that_is_killed_even_inside_a_sample(
    tmp_path: Path,
) -> None:
    worker = fork_context().Process(target=_hang, args=(str(tmp_path),), daemon=True)
    worker.start()
    until_s = time.monotonic() + _TIMEOUT_S
    while not (found := list(tmp_path.iterdir())) and time.monotonic() < until_s:
        multiprocessing.connection.wait([worker.sentinel], timeout=0.05)
    worker.kill()
    worker.join()
    (pid,) = (int(path.name) for path in found)
    while Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid):
        assert time.monotonic() < until_s, f"reader {pid} is still there"
        os.sched_yield()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
