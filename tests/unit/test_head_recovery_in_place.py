"""The controller when some workers live on: whom it keeps, where the next generation begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepopt.config import JobConfig
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.messages import Standing, Transfer
from support.head_fakes import LAYERS, HeadUnderTest

MIRROR = Plan(
    plan_id=1,
    layer_names=LAYERS,
    boundaries=(0, 2),
    placement=PlacementKind.MIRROR,
    schedule="bi_stream",
    pipeline_size=2,
    data_size=1,
    num_microbatches=4,
    num_groups=2,
)
Open = Callable[..., HeadUnderTest]


@pytest.fixture
def open_head(tmp_path: Path) -> Iterator[Open]:
    opened: list[HeadUnderTest] = []

    def open_head(**faults: object) -> HeadUnderTest:
        job = JobConfig.model_validate(
            {"training": {"steps": 6}, "checkpoint": {"every": 2}, "faults": faults}
        )
        opened.append(HeadUnderTest(tmp_path / "run", job=job, plan=MIRROR))
        return opened[-1]

    yield open_head
    for head in opened:
        head.close()


def standing(version: int, *, ready: bool = False) -> Standing:
    return Standing(version=version, ready=ready, layers=LAYERS)


def test_the_first_loss_interrupts_the_others_once(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3)
    head.dies(1)
    assert head.group.calls.count(("interrupt",)) == 1
    head.fails(0, "peer", standing=standing(3))
    assert head.group.calls.count(("interrupt",)) == 1


def test_who_lives_on_keeps_process_and_name_and_sends_what_another_lacks(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 3)
    before = head.sender(0)
    head.dies(1)
    head.fails(0, "peer", standing=standing(3))
    head.controller.tick()  # all have said where they stand: nothing to wait for
    assert head.group.calls[-3:] == [("kill_all", 0), ("prepare", 2, 2), ("launch", 2)]
    assert head.group.kept == {0: 0}
    kept, new = head.group.assignments
    assert (kept.sender.generation, kept.sender.incarnation) == (2, before.incarnation)
    assert new.start_step == 3
    assert new.in_place is not None
    assert new.in_place.transfers == tuple(
        Transfer(layer=layer, source=0, target=1) for layer in LAYERS
    )
    assert (new.in_place.previous_generation, new.in_place.report, new.in_place.save) == (
        1,
        False,
        False,
    )
    formed = head.events("generation")[-1]
    assert (formed["source"], formed["kept"], formed["start_step"]) == ("copies", [0], 3)
    head.ready()
    assert head.status["state"] == "running"
    head.steps(4, 6)
    assert [line["step"] for line in head.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_step_that_nobody_reported_and_its_checkpoint_are_made_up_for(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 3)
    head.dies(0)
    head.fails(1, "peer", standing=standing(4))
    head.controller.tick()
    in_place = head.group.assignments[0].in_place
    assert in_place is not None
    assert (in_place.report, in_place.save) == (True, True)
    assert head.group.assignments[0].start_step == 4


def test_a_worker_that_does_not_leave_its_group_is_replaced_as_well(open_head: Open) -> None:
    head = open_head(survivor_timeout_s=2.0).start().ready().steps(1, 3)
    head.dies(1)
    head.wait(1.5, beating=[0])
    assert head.status["generation"] == 1
    head.wait(0.75, beating=[0])
    assert head.status["generation"] == 2
    assert head.group.kept == {}
    assert head.group.assignments[0].in_place is None
    warnings = [event["message"] for event in head.events("warning")]
    assert any("rank 0 did not leave its group within" in message for message in warnings)


def test_spares_are_kept_from_the_first_step_on(open_head: Open) -> None:
    head = open_head(spares=2).start()
    assert head.group.spares == 0
    head.ready()
    assert head.group.spares == 2
    head.group.warm_spares = 1
    head.wait(0.5)
    assert head.status["warm_spares"] == 1
