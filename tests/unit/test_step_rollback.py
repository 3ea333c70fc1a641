"""A step that a fault breaks off is made whole or forgotten; no bit of what follows changes."""

from __future__ import annotations

import time

import pytest
import torch

from deepopt.errors import TransportError
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import Agreement
from support.lone_step import Cut, job_of, make_step, state_of

STEPS = 6


def add_counters(step: PipelineStep) -> list[torch.Tensor]:
    """Give each layer a buffer that counts its forwards."""
    counters = []
    for optimizer in step.optimizers.values():
        module = optimizer.layer.module
        counter = torch.zeros(())
        module.register_buffer("forwards", counter, persistent=False)
        module.register_forward_pre_hook(lambda *_, counter=counter: counter.add_(1) and None)
        counters.append(counter)
    return counters


@pytest.fixture(scope="module")
def undisturbed() -> tuple[list[float], dict[str, torch.Tensor]]:
    step = make_step(job_of(overlap=False), LoneTransport())
    losses = [step.run(number).loss for number in range(1, STEPS + 1)]
    return losses, state_of(step)


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
@pytest.mark.parametrize("broken", [3, 4, 5], ids=["unclipped", "clipped", "after"])
@pytest.mark.parametrize("told", [False, True], ids=["forgotten", "made-whole"])
def test_a_broken_exchange_changes_no_bit(
    overlap: bool,
    broken: int,
    told: bool,
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
) -> None:
    transport = Cut()
    step = make_step(job_of(overlap=overlap), transport)
    counters = add_counters(step)
    losses = {}
    number = 1
    while number <= STEPS:
        transport.fails = number == broken and broken not in losses
        if transport.fails:
            with pytest.raises(TransportError):
                step.run(number, go_on=overlap)
            assert (step.version, step.ready) == (number - 1, True)
            rows = tuple(map(tuple, transport.rows))
            losses[number] = step.result_of(Agreement(step=number, rows=rows)).loss
            if told:
                step.roll(number, agreement=Agreement(step=number, rows=rows))
                assert step.version == number
                number += 1
            else:
                step.roll(number - 1)
            assert not step.ready
            continue
        result = step.run(number, go_on=overlap and number < STEPS)
        losses[number] = result.loss
        number += 1
    assert [losses[n] for n in sorted(losses)] == undisturbed[0]
    for key, value in state_of(step).items():
        assert torch.equal(value, undisturbed[1][key]), key
    assert {int(counter) for counter in counters} == {2 * STEPS}


def test_a_step_that_never_got_whole_is_forgotten() -> None:
    class Fault(Exception):
        pass

    step = make_step(job_of(overlap=False), LoneTransport())
    twin = make_step(job_of(overlap=False), LoneTransport())
    assert step.run(1).loss == twin.run(1).loss

    def strike(number: int, action: object) -> None:
        if "B1" in str(action):
            raise Fault

    step.executor.before_action = strike
    with pytest.raises(Fault):
        step.run(2)
    assert (step.version, step.ready) == (1, False)
    step.executor.before_action = None
    step.roll(1)
    assert [step.run(n).loss for n in (2, 3)] == [twin.run(n).loss for n in (2, 3)]


def test_an_update_needs_the_exchange_of_its_own_step() -> None:
    step = make_step(job_of(overlap=False), Cut())
    step.run(1)
    with pytest.raises(AssertionError, match="step 2 is not whole"):
        step.roll(2, agreement=step.agreement)


def test_the_parts_of_a_steps_end_lie_inside_the_time_that_it_took() -> None:
    step = make_step(job_of(overlap=False), LoneTransport())
    step.run(1)
    assert "turn_wall_s" not in step.parts_s  # nothing came before
    began = time.perf_counter()
    step.run(2)
    took_s = time.perf_counter() - began
    parts = [step.parts_s[f"{name}_wall_s"] for name in ("reduce", "row", "agree", "update")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < took_s
    assert step.parts_s["turn_wall_s"] > 0
    step.begin_at(2)
    step.run(3)
    assert "turn_wall_s" not in step.parts_s  # what lay between is no turn


def test_the_executor_says_since_when_an_action_is_in_work() -> None:
    step = make_step(job_of(overlap=False), LoneTransport())
    seen: list[tuple[float, float]] = []
    step.executor.before_action = lambda *_: seen.append(
        (step.executor.action_began_s, time.monotonic())
    )
    before_s = time.monotonic()
    step.run(1)
    assert len(seen) == len(step.executor.program)
    ends_s = [before_s, *(now_s for _, now_s in seen)]
    for (began_s, now_s), end_s in zip(seen, ends_s, strict=False):
        assert end_s <= began_s <= now_s
