"""The fault script: each kind strikes once, at its moment, and what would never strike is refused."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.errors import InputError, TrainingError
from deepopt.schedule.ir import Action, Op
from deepopt.worker.bit_flip import flip_a_bit
from deepopt.worker.fault_script import FaultScript

F, B = Action(0, Op.F, 0), Action(0, Op.B, 0)


def script(*faults: dict[str, Any], **hands: Any) -> FaultScript:
    job = JobConfig.model_validate({"faults": {"inject": faults}})
    return FaultScript(job.faults.inject, rank=1, generation=2, **hands)


def at(step: int, op: str | None = None, **other: Any) -> dict[str, Any]:
    return {"rank": 1, "step": step, "generation": 2, "op": op, **other}


def test_a_fault_strikes_once_before_its_action_alone() -> None:
    faults = script({"raise": at(3, "B")})
    faults(2, B)
    faults(3, F)
    with pytest.raises(TrainingError, match="before 0B0 of step 3"):
        faults(3, B)
    faults(3, B)


def test_faults_of_other_ranks_and_generations_are_left_to_them() -> None:
    assert not script({"raise": {**at(1), "rank": 0}}, {"raise": {**at(1), "generation": 1}})


def test_a_moment_between_actions_has_a_name() -> None:
    faults = script({"raise": at(1, "UPDATE")})
    faults.check([F, B])
    faults(1, F)
    faults(1, "EXCHANGE")
    with pytest.raises(TrainingError, match="before UPDATE of step 1"):
        faults(1, "UPDATE")


def test_an_operation_that_never_comes_is_refused_with_those_that_do() -> None:
    with pytest.raises(InputError, match="never runs 'SEND_F'") as caught:
        script({"kill": at(1, "SEND_F")}).check([F, B])
    assert (
        caught.value.remedy == "use one of B, F, EXCHANGE, UPDATE, SAVE, or an action like 0F0"
    )


def test_a_delay_takes_its_time_and_goes_on() -> None:
    began_s = time.monotonic()
    script({"delay": at(1, duration_s=0.05)})(1, F)
    assert time.monotonic() - began_s >= 0.05


def test_sigterm_is_only_a_notice() -> None:
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        script({"term": at(1)})(1, F)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_a_full_disk_refuses_writes_until_there_is_room_again(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        script({"full_disk": at(1, duration_s=0.6)})(1, F)
        with pytest.raises(OSError, match="File too large"):
            file.write(b"x")
        until_s = time.monotonic() + 60
        while True:
            try:
                file.write(b"x")
                break
            except OSError:
                assert time.monotonic() < until_s
                time.sleep(0.02)
    assert (tmp_path / "file").stat().st_size == 1


def test_a_blow_that_finds_nothing_yet_strikes_as_soon_as_it_can() -> None:
    there = iter([False, False, True])
    found = []

    def flip() -> bool:
        found.append(next(there))
        return found[-1]

    faults = script({"flip": at(2, "F")}, blows={"flip": flip})
    faults(1, F)
    assert found == []
    for action in (F, B, B, B):
        faults(2, action)
    assert found == [False, False, True]


class _Layer:
    def __init__(self, *parameters: torch.nn.Parameter) -> None:
        self.trainable = dict(enumerate(parameters))


def test_a_flipped_bit_makes_the_largest_element_enormous() -> None:
    empty, weight = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    layers: Any = [_Layer(empty), _Layer(weight)]
    assert not flip_a_bit(layers)
    weight.grad = torch.zeros(2, 2)
    assert not flip_a_bit(layers)
    weight.grad = torch.tensor([[0.25, -0.5], [0.0, 0.125]])
    assert flip_a_bit(layers)
    assert weight.grad.tolist() == [[0.25, -(2.0**127)], [0.0, 0.125]]
