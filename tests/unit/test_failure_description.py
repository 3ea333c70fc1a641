"""Whose an error in a worker is: its own, a peer's, or its device's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.errors import DeviceError, TrainingError, TransportError
from deepopt.worker.device import choose_device
from deepopt.worker.failure_description import describe_failure
from deepopt.worker.messages import Heartbeat, Sender

BEAT = Heartbeat(
    sender=Sender(job_id="job", generation=1, plan_id=1, rank=1, incarnation="a"),
    step=3,
    progress=0,
    action="",
)


def kind_of(error: BaseException, *, is_set_up: bool = True) -> str:
    return describe_failure(error, beat=BEAT, is_set_up=is_set_up, standing=None).kind


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("No CUDA GPUs are available"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ..."),
        RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        DeviceError("torch sees no GPU"),
    ],
)
def test_a_device_that_is_gone_or_broken_is_not_the_workers_own_error(
    error: Exception,
) -> None:
    assert kind_of(error) == "device"
    assert kind_of(error, is_set_up=False) == "device"
    wrapped = TrainingError("stage 1 failed")
    wrapped.__cause__ = error
    assert kind_of(wrapped) == "device"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("no CUDA GPUs are available"),
    ],
)
def test_what_the_model_does_wrong_is_its_own_error_on_any_device(error: Exception) -> None:
    assert kind_of(error) == "error"
    assert kind_of(error, is_set_up=False) == "setup"


def _allocate_too_much() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _multiply_other_shapes() -> None:
    torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize(
    ("does", "told"), [(_allocate_too_much, True), (_multiply_other_shapes, False)]
)
def test_who_runs_out_of_memory_is_told_what_takes_less(
    does: Callable[[], None], told: bool
) -> None:
    with pytest.raises(RuntimeError) as caught:
        does()
    failure = describe_failure(caught.value, beat=BEAT, is_set_up=True, standing=None)
    assert failure.exit_code == 5
    assert ("training.microbatch_size" in failure.remedy) is told


def test_a_broken_link_is_a_peers() -> None:
    assert kind_of(TransportError("receive from rank 0 failed")) == "peer"


def test_a_process_that_sees_no_gpu_has_lost_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = JobConfig.model_validate({"worker": {"device": "cuda"}})
    with pytest.raises(DeviceError, match="torch sees no GPU"):
        choose_device(job)
