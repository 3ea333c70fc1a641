"""The worker group with actors that are none: what it makes of Ray's words."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from ray.exceptions import ActorDiedError

import ray
from deepopt.cluster.group import HeadEvent, SpareGone, WorkerGone
from deepopt.cluster.slots import Slot, Slots
from deepopt.cluster.worker_group import RayWorkerGroup
from deepopt.job_file import load_job
from deepopt.run_directory import RunDirectory
from deepopt.worker.adopted import Whereabouts
from deepopt.worker.messages import Assignment


class PendingCall:
    """A call of an actor that nothing has come of yet."""

    def __init__(self) -> None:
        self.outcome: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.outcome


class StartingActor:
    """An actor whose process does not run yet: no call of it is answered before it is killed."""

    made: ClassVar[list[StartingActor]] = []

    def __init__(self, **_: Any) -> None:
        self.calls: list[PendingCall] = []
        StartingActor.made.append(self)

    def __getattr__(self, name: str) -> Any:
        if name == "remote":
            return self._call
        return self

    def _call(self, *_: Any) -> PendingCall:
        self.calls.append(PendingCall())
        return self.calls[-1]

    def die(self) -> None:
        for call in self.calls:
            if not call.outcome.done():
                call.outcome.set_exception(ActorDiedError())


class StartingActors:
    """A class of such actors."""

    def options(self, **_: Any) -> StartingActors:
        return self

    remote = StartingActor


@pytest.fixture
def told() -> list[HeadEvent]:
    """What the group has said."""
    return []


@pytest.fixture
def group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[HeadEvent]
) -> RayWorkerGroup:
    made = RayWorkerGroup(
        slots=Slots(places=(Slot(host="here"),), use_gpus=False, head_node_id="0"),
        run=RunDirectory(tmp_path),
        head=None,
        tell=told.append,
        job=load_job(None, ["training.steps=1"]),
        lease_s=1.0,
    )
    monkeypatch.setattr(StartingActor, "made", [])
    monkeypatch.setattr(made._starter, "_actor_class", StartingActors())
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: actor.die())
    return made


def test_a_spare_that_is_killed_while_it_starts_is_not_waited_for(
    group: RayWorkerGroup,
) -> None:
    group.keep_spares(1)
    group.kill_all(timeout_s=1.0)  # raises where one is still there


def test_a_process_that_waits_for_a_place_is_not_waited_for_when_it_is_killed_at_its_start(
    group: RayWorkerGroup,
) -> None:
    group.seek([0])
    group.kill_all(timeout_s=1.0)


@pytest.mark.parametrize("agent_first", [False, True])
def test_the_end_of_a_worker_that_once_was_a_spare_is_told(
    group: RayWorkerGroup, told: list[HeadEvent], agent_first: bool
) -> None:
    group.keep_spares(1)
    group.prepare(1, places=[0])
    spare = StartingActor.made[0]
    group.launch(cast("list[Assignment]", [None]))
    if agent_first:
        group.confirm_exit(0, how="killed by SIGKILL")
    spare.die()
    gone = [event for event in told if isinstance(event, WorkerGone)]
    assert [(event.generation, event.rank) for event in gone] == [(1, 0)]


def test_the_end_of_a_process_of_this_host_is_named_without_its_agent(
    group: RayWorkerGroup, told: list[HeadEvent]
) -> None:
    group.prepare(1, places=[0])
    with subprocess.Popen(["sleep", "100"]) as process:
        (actor,) = StartingActor.made
        found = Whereabouts(pid=process.pid, host="here", node_id="0")
        actor.calls[0].outcome.set_result(found)
        group.launch(cast("list[Assignment]", [None]))
        process.kill()
        actor.die()
    gone = [event for event in told if isinstance(event, WorkerGone)]
    assert [event.reason for event in gone] == ["its process was killed by SIGKILL"]


def test_spares_that_cannot_even_start_are_not_tried_again_and_again(
    group: RayWorkerGroup, told: list[HeadEvent]
) -> None:
    for _ in range(9):  # at each look of the head
        group.keep_spares(1)
        StartingActor.made[-1].die()
    assert len(StartingActor.made) == 3
    (gone,) = [event for event in told if isinstance(event, SpareGone)]
    assert gone.given_up.startswith("3 spares in a row ended before they were ready")
    assert gone.given_up.endswith("spare-2.log")
    group.prepare(1, places=[0])
    group.keep_spares(1)
    assert len(StartingActor.made) == 5  # the worker's process, and a spare


def test_a_spare_that_was_ready_is_replaced_each_time(
    group: RayWorkerGroup, told: list[HeadEvent]
) -> None:
    for _ in range(9):
        group.keep_spares(1)
        spare = StartingActor.made[-1]
        spare.calls[-1].outcome.set_result(None)  # of `wait_as_spare`
        spare.die()
    assert len(StartingActor.made) == 9
    assert told == [SpareGone()] * 9


class Interrupted(list[Any]):
    """Spares of a group; when its first reader asks for one, another thread comes in between."""

    def __init__(self, spares: list[Any], other: Callable[[], None]) -> None:
        super().__init__(spares)
        self._thread = threading.Thread(target=other)

    def __contains__(self, spare: object) -> bool:
        if self._thread.ident is None:
            self._thread.start()
            self._thread.join(timeout=0.1)  # it may have to wait for who asks
        return super().__contains__(spare)

    def join(self) -> None:
        self._thread.join()


def test_a_spare_that_ends_while_it_is_given_a_place_is_not_taken_for_a_living_worker(
    group: RayWorkerGroup, told: list[HeadEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    group.keep_spares(1)
    waiting = group._waiting
    spares = Interrupted(waiting._spares, lambda: group.prepare(1, places=[0]))
    monkeypatch.setattr(waiting, "_spares", spares)
    spare = StartingActor.made[0]
    spare.die()
    spares.join()
    group.launch(cast("list[Assignment]", [None]))
    StartingActor.made[-1].die()
    gone = [event for event in told if isinstance(event, WorkerGone)]
    assert [(event.generation, event.rank) for event in gone] == [(1, 0)]
