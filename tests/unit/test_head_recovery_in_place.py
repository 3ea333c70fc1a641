"""The controller when some workers live on: whom it keeps, where the next generation begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deepopt.cluster.group import SpareGone
from deepopt.cluster.process_look import ProcessLook
from deepopt.config import JobConfig
from deepopt.head.spares import SPARE_WAIT_S
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

    def open_head(*, plan: Plan = MIRROR, **faults: object) -> HeadUnderTest:
        job = JobConfig.model_validate(
            {"training": {"steps": 6}, "checkpoint": {"every": 2}, "faults": faults}
        )
        opened.append(HeadUnderTest(tmp_path / "run", job=job, plan=plan))
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
    assert any("rank 0 has not left its group 2.0 s after" in message for message in warnings)


def lose_a_stage(head: HeadUnderTest, *, copied: int, damage: int | None = None) -> None:
    """A line's second worker dies after step 5; the first has a copy of it, and its own of then."""
    head.start().ready().steps(1, 2).checkpoint(2).steps(3, 4).checkpoint(4).steps(5, 5)
    if damage is not None:
        (file,) = head.run.checkpoints.glob(f"step-*{damage}/*embed*")
        file.write_bytes(b"")
    head.dies(1)
    stands = Standing(
        version=5,
        ready=False,
        layers=LAYERS[:2],
        replicas={copied: LAYERS[2:]},
        held=(copied,),
    )
    head.fails(0, "peer", standing=stands)
    head.controller.tick()


@pytest.mark.parametrize(
    ("copied", "damage", "source", "step"),
    [
        pytest.param(5, None, "replicas", 5, id="newer-copy"),
        pytest.param(3, None, "checkpoint", 4, id="newer-checkpoint"),
        pytest.param(3, 4, "replicas", 3, id="damaged-checkpoint"),
    ],
)
def test_a_lost_stage_comes_from_the_newer_of_a_peers_memory_and_the_disk(
    open_head: Open, copied: int, damage: int | None, source: str, step: int
) -> None:
    head = open_head(plan=replace(MIRROR, placement=PlacementKind.LINE, schedule="1f1b"))
    lose_a_stage(head, copied=copied, damage=damage)
    formed = head.events("generation")[-1]
    assert (formed["source"], formed["start_step"]) == (source, step)
    assert [a.start_step for a in head.group.assignments] == [step, step]


def stand_still(head: HeadUnderTest, duration_s: float, actions: dict[int, str]) -> None:
    """Workers speak and get no further; an agent sees them asleep."""
    for _ in range(round(duration_s / 0.25)):
        head.clock.now_s += 0.25
        for rank, action in actions.items():
            head.beat(rank, step=6, progress=60, action=action)
        head.agent(looks={rank: ProcessLook(state="S", cpu_share=0.0) for rank in (0, 1)})
        head.controller.tick()


def steady(open_head: Open) -> HeadUnderTest:
    return open_head(hang_steps=1.0).start().ready().steps(1, 5)


def test_when_all_wait_who_does_not_leave_is_the_culprit_and_the_others_are_kept(
    open_head: Open,
) -> None:
    head = steady(open_head)
    stand_still(head, 2.5, {0: "0RECV_B0", 1: "1RECV_F0"})
    assert ("interrupt",) in head.group.calls
    assert not [call for call in head.group.calls if call[0] == "kill"]
    head.fails(0, "peer", standing=standing(5))
    stand_still(head, 2.5, {1: "1RECV_F0"})
    assert head.status["generation"] == 1
    stand_still(head, 1.0, {1: "1RECV_F0"})
    assert head.status["generation"] == 2
    assert head.group.kept == {0: 0}
    (fault,) = head.status["faults"]
    assert (fault["cause"], fault["culprit"]["rank"]) == ("stuck", 1)
    assert "did not leave its group when told to" in fault["culprit"]["message"]
    assert [victim["rank"] for victim in fault["victims"]] == [0]
    assert 2.0 <= fault["times_s"]["detect"] <= 2.5


def test_when_all_wait_and_all_leave_no_process_is_lost(open_head: Open) -> None:
    head = steady(open_head)
    stand_still(head, 3.5, {0: "0RECV_B0", 1: "1RECV_F0"})
    for rank in (1, 0):
        head.fails(rank, "peer", standing=standing(5))
    head.controller.tick()
    assert head.status["generation"] == 2
    assert head.group.kept == {0: 0, 1: 1}
    (fault,) = head.status["faults"]
    assert (fault["cause"], fault["source"]) == ("collective", "survivors")
    assert "all left their group when told to" in fault["culprit"]["message"]


def test_a_worker_that_dies_while_all_leave_is_the_culprit(open_head: Open) -> None:
    head = steady(open_head)
    stand_still(head, 3.5, {0: "0RECV_B0", 1: "1RECV_F0"})
    head.dies(1)
    head.fails(0, "peer", standing=standing(5))
    head.controller.tick()
    (fault,) = head.status["faults"]
    assert (fault["cause"], fault["culprit"]["rank"]) == ("exit", 1)


def test_a_peer_inside_an_operation_is_not_waited_for_longer_than_a_step_could_take(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 5)
    head.beat(0, step=6, progress=60, action="0RECV_B0")
    head.dies(1)
    stand_still(head, 2.75, {0: "0RECV_B0"})
    assert head.status["generation"] == 1
    stand_still(head, 0.5, {0: "0RECV_B0"})
    assert head.status["generation"] == 2


def test_a_spare_that_dies_is_replaced_while_the_job_runs(open_head: Open) -> None:
    head = open_head(spares=2).start().ready().steps(1, 1)
    head.group.spares = 0
    head.controller.handle(SpareGone())
    assert head.group.spares == 2


def test_spares_that_are_given_up_are_told_of(open_head: Open) -> None:
    head = open_head(spares=2).start().ready().steps(1, 1)
    head.controller.handle(SpareGone(given_up="3 spares in a row ended"))
    assert [e["message"] for e in head.events("warning")] == ["3 spares in a row ended"]


def test_a_spare_that_dies_in_a_recovery_is_replaced_after_it(open_head: Open) -> None:
    head = open_head(spares=2).start().ready()
    head.controller.handle(SpareGone())
    assert head.group.spares == 0


def test_spares_are_started_after_a_step_so_that_they_take_no_cpu_from_it(
    open_head: Open,
) -> None:
    head = open_head(spares=2).start()
    assert head.group.spares == 0
    head.ready().wait(0.5)
    assert head.group.spares == 0
    head.steps(1, 1).controller.tick()
    assert head.group.spares == 2


def test_spares_do_not_wait_for_the_end_of_a_long_step(open_head: Open) -> None:
    head = open_head(spares=2).start().ready()
    head.wait(SPARE_WAIT_S, beating=(0, 1))
    assert head.group.spares == 2


def test_after_a_fault_spares_wait_for_a_step_that_was_not_done_before(
    open_head: Open,
) -> None:
    head = open_head(spares=2).start().ready().steps(1, 3)
    head.group.spares = 1
    head.dies(1)
    head.fails(0, "peer", standing=standing(2))
    head.controller.tick()
    assert head.group.assignments[0].start_step == 2
    head.ready().steps(3, 3).controller.tick()
    assert head.group.spares == 1
    head.steps(4, 4).controller.tick()
    assert head.group.spares == 2


def test_the_status_tells_of_warm_spares(open_head: Open) -> None:
    head = open_head(spares=2).start().ready()
    head.group.warm_spares = 1
    head.wait(0.5)
    assert head.status["warm_spares"] == 1
