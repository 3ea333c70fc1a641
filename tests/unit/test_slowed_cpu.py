"""Real workers that a job slows."""

import time

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.errors import InputError
from deepopt.launch.plan_use import as_slowed
from deepopt.launch.preparation import resolved
from deepopt.pipeline.slowed_cpu import SlowedCpu, slow_factor
from deepopt.schedule.ir import Action, Op
from deepopt.worker.layer_trial import SlowedClock
from support.plan_files import plan_file

CPU = torch.device("cpu")
MATRIX = torch.ones(256, 256)


def job(
    device: str = "cpu", *, threads: int = 1, factors: tuple[float, ...] = (1.0, 2.0)
) -> JobConfig:
    return JobConfig.model_validate(
        {
            "worker": {"device": device, "threads": threads, "count": 2},
            "emulation": {"rank_factor": factors},
        }
    )


def work() -> float:
    """CPU seconds that some products took."""
    began = time.thread_time()
    while time.thread_time() - began < 2e-3:
        torch.mm(MATRIX, MATRIX)
    return time.thread_time() - began


def test_compute_takes_its_factor_in_cpu_time_and_waits_for_others_do_not() -> None:
    recorder = SlowedCpu(3.0)
    compute = Action(stage=0, op=Op.F, microbatch=0)
    receive = Action(stage=0, op=Op.RECV_F, microbatch=0)
    took = []
    for action in (compute, receive):
        recorder.begin()
        took.append(work())
        recorder.end(action)
    slowed, plain = (span.busy_ns * 1e-9 for span in recorder.take())
    assert slowed == pytest.approx(3 * took[0], rel=0.1)
    assert plain == pytest.approx(took[1], rel=0.1)


def test_updates_and_trials_take_their_factor() -> None:
    began = time.thread_time()
    with SlowedCpu(3.0).updates():
        took = work()
    assert time.thread_time() - began == pytest.approx(3 * took, rel=0.1)
    seconds, took = SlowedClock(2.0).measure("F", work)
    assert seconds == pytest.approx(2 * took, rel=0.1)


def test_only_real_workers_on_cpus_are_slowed_by_their_own_factor() -> None:
    assert [slow_factor(job(), pipeline_rank=rank, device=CPU) for rank in (0, 1)] == [1.0, 2.0]
    assert slow_factor(job("emulated"), pipeline_rank=1, device=CPU) == 1.0
    assert slow_factor(job(), pipeline_rank=1, device=torch.device("cuda", 0)) == 1.0
    assert slow_factor(job(factors=()), pipeline_rank=1, device=CPU) == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (job("cuda"), "worker.device is cuda"),
        (job(threads=2), "worker.threads is 2"),
        (job(factors=(0.5, 1.0)), "has 0.5, and a real worker cannot be faster"),
        (job(factors=(1.0, 1.0, 2.0)), "has 3 figures, a pipeline has 2 ranks"),
    ],
)
def test_workers_that_cannot_be_slowed_are_refused(wrong: JobConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolved(wrong)


def test_a_plan_is_priced_with_the_factors_of_the_job_whatever_it_was_made_with() -> None:
    even = plan_file()
    assert as_slowed(even, factors=()) == even
    slowed = as_slowed(even, factors=(1.0, 1.6))
    assert slowed.costs().rank_factor == (1.0, 1.6)
    assert as_slowed(slowed, factors=()).costs().rank_factor == ()
    assert as_slowed(slowed, factors=(1.6, 1.6)).costs().rank_factor == pytest.approx(
        (1.6, 1.6)
    )
