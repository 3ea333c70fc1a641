"""When a job shrinks and when it grows: the decisions, and the controller that acts on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.cluster.group import PlaceFound, WorkerGone, WorkerUp
from deepopt.config import FaultsConfig, JobConfig
from deepopt.head.journal import read_journal, replay
from deepopt.head.resize import bad_places, grows_now, layouts, plan_for
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan import Plan
from deepopt.telemetry.files import read_json
from deepopt.worker.messages import RunEnded, Standing
from support.head_fakes import LAYERS, HeadUnderTest, make_plan, make_skeleton

Open = Callable[..., HeadUnderTest]


@given(available=st.integers(1, 64), data=st.integers(1, 8))
def test_as_many_places_as_possible_are_used_by_whole_replicas(
    available: int, data: int
) -> None:
    found = layouts(available, data=data)
    assert found[0][0] == available  # one replica can use them all
    assert all(workers % d == 0 and workers <= available and d <= data for workers, d in found)
    assert [workers for workers, _ in found] == sorted(
        (workers for workers, _ in found), reverse=True
    )


FAULTS = FaultsConfig(grow_after_s=10.0)


def test_a_job_grows_at_once_when_all_is_there_and_the_last_change_is_long_ago() -> None:
    assert grows_now({1: 95.0}, missing={1}, resized_s=[80.0], now_s=96.0, faults=FAULTS)


def test_a_job_does_not_flap() -> None:
    def grows(now_s: float, *shrunk_s: float) -> bool:
        return grows_now(
            {1: now_s - 1}, missing={1}, resized_s=shrunk_s, now_s=now_s, faults=FAULTS
        )

    assert not grows(105.0, 100.0)
    assert grows(110.0, 100.0)
    assert not grows(119.0, 50.0, 100.0)  # the second time it waits twice as long
    assert grows(120.0, 50.0, 100.0)
    assert not grows(139.0, 10.0, 50.0, 100.0)
    assert grows(3600.0 + 110.0, 50.0, 3600.0 + 99.0)  # the first is forgotten


def test_a_job_waits_a_while_for_all_places_before_it_takes_some() -> None:
    def grows(now_s: float) -> bool:
        return grows_now(
            {1: 100.0}, missing={1, 2}, resized_s=[0.0], now_s=now_s, faults=FAULTS
        )

    assert not grows(105.0)
    assert grows(110.0)


def test_without_grow_after_a_job_never_grows() -> None:
    faults = FaultsConfig(grow_after_s=None)
    assert not grows_now({1: 0.0}, missing={1}, resized_s=[], now_s=1e6, faults=faults)


def test_a_plan_for_fewer_keeps_the_gradient_groups_and_ignores_what_was_for_more() -> None:
    wanted = Plan(
        plan_id=1,
        layer_names=LAYERS,
        boundaries=(0, 2),
        placement="mirror",  # type: ignore[arg-type]
        schedule="bi_stream",
        pipeline_size=2,
        data_size=2,
        num_microbatches=8,
        num_groups=4,
    )
    job = JobConfig.model_validate(
        {
            "training": {"microbatches": 8},
            "parallel": {"data": 2, "pipeline": 2},
            "pipeline": {"placement": "mirror", "boundaries": [0, 2]},
        }
    )
    for available in (1, 2, 3):
        plan = plan_for(
            job,
            make_skeleton(),
            wanted=wanted,
            available=available,
            plan_id=7,
            costs=None,
            cores=None,
            known=None,
        ).plan
        assert (plan.world_size, plan.num_groups, plan.plan_id) == (available, 4, 7)
        assert plan.num_microbatches == 8


def test_costs_that_name_single_ranks_do_not_keep_a_job_from_shrinking() -> None:
    wanted = make_plan(pipeline_size=3)
    costs = LayerCosts(
        forward_s=(1.0,) * 4,
        input_s=(1.0,) * 4,
        weight_s=(1.0,) * 4,
        activation_bytes=(1.0,) * 4,
        state_bytes=(10.0,) * 4,
        rank_factor=(1.0, 2.0, 1.0),
        memory_bytes=(90.0, 60.0, 90.0),
        host_of=(0, 0, 1),
        inter_host_latency_s=0.5,
        source="measured",
    )
    planned = plan_for(
        JobConfig.model_validate({"pipeline": {"placement": "line", "schedule": "1f1b"}}),
        make_skeleton(),
        wanted=wanted,
        available=2,
        plan_id=2,
        costs=costs,
        cores=None,
        known=None,
    )
    assert planned.plan.world_size == 2
    assert planned.costs.memory_bytes == (
        60.0,
        60.0,
    )  # of the smallest: nobody knows who is left
    assert planned.costs.latency_s == 0.5
    assert costs.names_ranks(3)
    assert not costs.names_ranks(2)


# --- the controller ----------------------------------------------------------------------


@pytest.fixture
def open_head(tmp_path: Path) -> Iterator[Open]:
    opened: list[HeadUnderTest] = []

    def open_head(**faults: object) -> HeadUnderTest:
        faults = {"place_timeout_s": 4.0, "grow_after_s": 6.0, **faults}
        job = JobConfig.model_validate(
            {
                "training": {"steps": 40},
                "checkpoint": {"every": 0},
                "faults": faults,
                "pipeline": {"placement": "line", "schedule": "1f1b"},
            }
        )
        plan = make_plan(pipeline_size=3)
        opened.append(HeadUnderTest(tmp_path / "run", job=job, plan=plan))
        return opened[-1]

    yield open_head
    for head in opened:
        head.close()


def standing(head: HeadUnderTest, rank: int, *, version: int) -> Standing:
    plan = head.group.assignments[rank].plan
    (stage,) = plan.held_stages(rank)
    own = tuple(LAYERS[i] for i in plan.stage_layers(stage))
    others = tuple(name for name in LAYERS if name not in own)
    return Standing(version=version, ready=False, layers=own, replicas={version: others})


DATA = ("text", "text", "text")


def lose(head: HeadUnderTest, rank: int, *, version: int) -> None:
    """A worker dies; the others stand, and its replacement gets no process."""
    others = [r for r in range(3) if r != rank]
    head.dies(rank)
    for other in others:
        head.fails(other, "peer", standing=standing(head, other, version=version))
    head.controller.tick()
    generation = head.sender(0).generation
    for other in others:
        head.controller.handle(
            WorkerUp(generation=generation, rank=other, pid=100 + other, host="alpha")
        )
        head.beat(other, step=version)


def interrupted(head: HeadUnderTest, *, version: int) -> None:
    """Whoever has a process leaves the group that was waiting for one more."""
    for rank in (0, 2):
        head.fails(rank, "peer", standing=standing(head, rank, version=version))
    head.controller.tick()


def shrunk(head: HeadUnderTest) -> HeadUnderTest:
    head.start().ready(data=DATA).steps(1, 3)
    lose(head, 1, version=3)
    head.wait(4.5, beating=[0, 2])
    interrupted(head, version=3)
    return head


def test_without_a_device_the_job_goes_on_with_fewer(open_head: Open) -> None:
    head = shrunk(open_head())
    assert head.group.places == (0, 2)
    assert head.group.kept == {0: 0, 1: 2}
    assert [a.plan.world_size for a in head.group.assignments] == [2, 2]
    assert {a.start_step for a in head.group.assignments} == {3}
    assert all(a.in_place is not None for a in head.group.assignments)
    head.ready()
    head.steps(4, 5)
    head.wait(0.5, beating=[0, 1])
    assert head.status["state"] == "running"
    assert (len(head.status["workers"]), head.status["workers_wanted"]) == (2, 3)
    (fault,) = head.status["faults"]
    assert fault["next"].endswith("shrank to 2 worker(s): no device for rank 1")
    assert (fault["outcome"], fault["lost_steps"]) == ("recovered", 0)
    assert (fault["culprit"]["rank"], fault["culprit"]["stages"]) == (1, [1])
    (resized,) = head.events("resized")
    assert (resized["num_workers"], resized["wanted"]) == (2, 3)


def test_the_journal_and_the_plan_file_hold_the_new_plan(open_head: Open) -> None:
    head = shrunk(open_head())
    history = replay(read_journal(head.run.journal).entries)
    assert history.plan is not None
    assert history.wanted is not None
    now, full = Plan.from_json(history.plan), Plan.from_json(history.wanted)
    assert (now.world_size, full.world_size, history.places) == (2, 3, (0, 2))
    assert now == Plan.from_json(read_json(head.run.plan))
    assert len(history.shrunk) == 1


def test_a_device_within_the_time_or_never_to_shrink_means_the_full_group(
    open_head: Open,
) -> None:
    head = open_head(shrink="never").start().ready(data=DATA).steps(1, 3)
    lose(head, 1, version=3)
    head.wait(30.0, beating=[0, 2])
    assert head.events("resized") == []
    assert head.group.calls[-1] == ("launch", 2)


def test_too_few_workers_are_not_gone_on_with(open_head: Open) -> None:
    head = open_head(min_workers=3).start().ready(data=DATA).steps(1, 3)
    lose(head, 1, version=3)
    head.wait(30.0, beating=[0, 2])
    assert head.events("resized") == []


def test_a_host_that_is_gone_is_not_waited_for(open_head: Open) -> None:
    head = open_head().start().ready(data=DATA).steps(1, 3)
    lose(head, 1, version=3)
    head.controller.handle(
        WorkerGone(generation=2, rank=1, reason="no such host", no_place=True)
    )
    interrupted(head, version=3)
    assert head.group.places == (0, 2)
    assert len(head.status["faults"]) == 1


def loses_device(head: HeadUnderTest, rank: int, *, version: int, step: int) -> None:
    """A worker's device is gone; the others stand."""
    head.fails(rank, "device", step=step, message="CUDA error: uncorrectable ECC error")
    for other in {0, 1, 2} - {rank}:
        head.fails(other, "peer", standing=standing(head, other, version=version))
    head.controller.tick()


def test_a_device_that_is_lost_again_is_done_without(open_head: Open) -> None:
    head = open_head().start().ready(data=DATA).steps(1, 3)
    loses_device(head, 1, version=3, step=4)
    assert (head.sender(0).generation, head.group.places) == (2, (0, 1, 2))  # a new process
    loses_device(head, 1, version=3, step=0)  # while it is set up
    assert (head.sender(0).generation, head.group.places) == (3, (0, 2))
    assert head.group.kept == {0: 0, 1: 2}
    head.ready().steps(4, 5)
    head.wait(60.0, beating=[0, 1])
    assert (head.status["state"], len(head.status["workers"])) == ("running", 2)
    assert head.group.sought == ()  # its process would start, and lose the device
    last = head.status["faults"][-1]
    assert last["next"].endswith("shrank to 2 worker(s): no device that works for rank 1")
    assert (last["cause"], last["outcome"]) == ("device", "recovered")


def test_a_lost_device_ends_a_job_that_may_not_shrink(open_head: Open) -> None:
    head = open_head(shrink="never").start().ready(data=DATA).steps(1, 3)
    loses_device(head, 1, version=3, step=4)
    loses_device(head, 1, version=3, step=0)
    assert head.status["state"] == "failed"
    assert "rank 1 failed while starting: CUDA error" in head.status["error"]["message"]


def test_a_first_launch_without_a_device_fails_at_once(open_head: Open) -> None:
    head = open_head().start()
    loses_device(head, 1, version=0, step=0)
    assert head.status["state"] == "failed"
    assert "failed while starting: CUDA error" in head.status["error"]["message"]


def test_devices_lost_long_ago_make_no_place_a_bad_one() -> None:
    lost_s = {0: [10.0, 90.0], 1: [80.0, 90.0], 2: [90.0]}
    assert bad_places(lost_s, now_s=100.0, window_s=50.0) == {1}


def test_a_first_launch_does_not_shrink(open_head: Open) -> None:
    head = open_head().start()
    head.wait(20.0)
    assert head.events("resized") == []


def test_the_job_grows_between_two_steps_by_the_plan_that_it_began_with(
    open_head: Open,
) -> None:
    head = shrunk(open_head())
    first = head.plan
    head.ready()
    head.steps(4, 5)
    head.wait(1.0, beating=[0, 1])
    assert head.group.sought == (1,)
    head.controller.handle(PlaceFound(place=1, is_there=True))
    head.wait(3.0, beating=[0, 1])
    assert ("leave",) not in head.group.calls  # it has only just shrunk
    head.wait(4.0, beating=[0, 1])
    assert head.group.calls.count(("leave",)) == 1
    for rank in (0, 1):
        head.controller.handle(
            RunEnded(
                sender=head.sender(rank),
                step=6,
                reason="left",
                standing=standing(head, rank, version=6),
            )
        )
    head.controller.tick()
    assert head.group.places == (0, 1, 2)
    assert head.group.kept == {0: 0, 2: 1}
    plan = head.group.assignments[0].plan
    assert (plan.fingerprint(), plan.plan_id) == (first.fingerprint(), 3)
    assert {a.start_step for a in head.group.assignments} == {6}
    assert head.events("resized")[-1]["num_workers"] == 3
    head.ready(data=DATA)
    assert head.status["state"] == "running"
    assert len(head.status["faults"]) == 1  # it is no fault


def test_a_stop_that_comes_when_workers_have_agreed_to_leave_is_one_with_a_checkpoint(
    open_head: Open,
) -> None:
    head = shrunk(open_head())
    head.ready()
    head.steps(4, 5)
    head.controller.handle(PlaceFound(place=1, is_there=True))
    head.wait(8.0, beating=[0, 1])
    head.controller.request_stop()
    for rank in (0, 1):
        word = standing(head, rank, version=6)
        head.controller.handle(
            RunEnded(sender=head.sender(rank), step=6, reason="left", standing=word)
        )
    head.controller.tick()
    assert (head.group.places, head.group.kept) == ((0, 2), {0: 0, 1: 1})
    assert {a.start_step for a in head.group.assignments} == {6}
    head.ready()
    assert head.group.calls.count(("stop",)) == 2
    for rank in (0, 1):
        head.controller.handle(RunEnded(sender=head.sender(rank), step=7, reason="stopped"))
    head.controller.tick()
    assert (head.status["state"], head.status["exit_code"]) == ("stopped", 0)


def test_a_place_that_goes_while_the_job_grows_makes_it_shrink_again(open_head: Open) -> None:
    head = shrunk(open_head())
    head.ready()
    head.steps(4, 5)
    head.controller.handle(PlaceFound(place=1, is_there=True))
    head.wait(8.0, beating=[0, 1])
    for rank in (0, 1):
        word = standing(head, rank, version=6)
        head.controller.handle(
            RunEnded(sender=head.sender(rank), step=6, reason="left", standing=word)
        )
    head.controller.tick()
    for rank in (0, 2):
        generation = head.sender(rank).generation
        head.controller.handle(
            WorkerUp(generation=generation, rank=rank, pid=100 + rank, host="alpha")
        )
    head.wait(4.5, beating=[0, 2])
    interrupted(head, version=6)
    assert head.group.places == (0, 2)
    assert {a.start_step for a in head.group.assignments} == {6}
    assert [event["num_workers"] for event in head.events("resized")] == [2, 3, 2]


def test_a_place_that_goes_again_is_not_taken_in(open_head: Open) -> None:
    head = shrunk(open_head())
    head.ready()
    head.steps(4, 5)
    head.controller.handle(PlaceFound(place=1, is_there=True))
    head.controller.handle(PlaceFound(place=1, is_there=False))
    head.wait(20.0, beating=[0, 1])
    assert ("leave",) not in head.group.calls


def test_a_new_head_knows_the_size_and_how_large_the_job_shall_be(
    open_head: Open, tmp_path: Path
) -> None:
    old = shrunk(open_head())
    assignments = old.group.assignments
    new = HeadUnderTest(tmp_path / "run", job=old.job, plan=old.plan)
    new.group.assignments = assignments
    new.controller.take_over({}, died_s=new.clock.now_s - 1.0, reason="killed")
    assert new.group.places == (0, 2)
    assert new.group.assignments[0].plan.world_size == 2
    assert new.status["workers_wanted"] == 3
    new.close()
