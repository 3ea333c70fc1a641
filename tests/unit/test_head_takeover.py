"""A head that takes over from one that died: what it adopts, what it recalls, what it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from deepopt.cluster.process_look import ProcessLook
from deepopt.config import JobConfig
from deepopt.head.head_watch import TIMEOUT_S, HeadWatch
from deepopt.head.journal import replay
from deepopt.pipeline.weight_ways import Verdict, Way
from deepopt.worker.adopted import Adopted, Whereabouts
from deepopt.worker.messages import Assignment, RunEnded, WeightWork, WorkerReady
from support.head_fakes import HeadUnderTest

Open = Callable[..., HeadUnderTest]


@pytest.fixture
def open_head(tmp_path: Path) -> Iterator[Open]:
    opened: list[HeadUnderTest] = []

    def open_head(**faults: float) -> HeadUnderTest:
        job = JobConfig.model_validate(
            {"training": {"steps": 6}, "checkpoint": {"every": 2}, "faults": faults}
        )
        head = HeadUnderTest(tmp_path / "run", job=job)
        if opened:  # its predecessor died: nothing of it was closed or ended
            head.group.assignments = opened[-1].group.assignments
            head.clock.now_s = opened[-1].clock.now_s + 3.0
        opened.append(head)
        return head

    yield open_head
    for head in opened:
        head.close()


def adopted(assignment: Assignment, *, ready: bool = True) -> Adopted:
    rank = assignment.sender.rank
    word = WorkerReady(
        sender=assignment.sender,
        pid=100 + rank,
        host="alpha",
        stages=(rank,),
        device="cpu",
        setup_s={},
        peak_flops=1e6,
        peak_source="job",
        data_fingerprint="text",
    )
    return Adopted(
        whereabouts=Whereabouts(pid=100 + rank, host="alpha", node_id="n"),
        sender=assignment.sender,
        start_step=assignment.start_step,
        ready=word if ready else None,
    )


def all_of(head: HeadUnderTest) -> dict[int, Adopted]:
    return {a.sender.rank: adopted(a) for a in head.group.assignments}


def take_over(head: HeadUnderTest, found: Mapping[int, Adopted]) -> None:
    head.controller.take_over(
        found, died_s=head.clock.now_s - 2.0, reason="the head's process was killed"
    )


def test_a_new_head_learns_what_workers_found_of_weight_gradients_and_tells_the_next_group(
    open_head: Open,
) -> None:
    old = open_head().start().ready().steps(1, 3)
    ways = {"embed": Verdict(way=Way.DEFERRED)}
    found = all_of(old)
    said = WeightWork(sender=old.sender(0), notes=(), conditions="CPU X", ways=ways)
    found[0] = replace(found[0], weight_work=said)
    head = open_head()
    take_over(head, found)
    head.dies(1)
    head.wait(15.0)
    assert head.status["generation"] == 2
    assert head.group.assignments[1].known_ways == {"CPU X": ways}


def test_workers_go_on_in_their_generation_under_a_new_head(open_head: Open) -> None:
    old = open_head().start().ready().steps(1, 3).checkpoint(2)
    head = open_head()
    take_over(head, all_of(old))
    status = head.status
    assert (status["state"], status["generation"], status["step"]) == ("running", 1, 3)
    assert (status["checkpoint_step"], [w["pid"] for w in status["workers"]]) == (2, [100, 101])
    assert head.group.calls == []  # nobody was killed, started or interrupted
    (fault,) = status["faults"]
    assert (fault["cause"], fault["culprit"], fault["outcome"]) == ("head", None, "open")
    assert fault["next"] == "2 worker(s) of generation 1 go on"
    head.steps(4, 4)
    head.wait(0.5, beating=[0, 1])
    (fault,) = head.status["faults"]
    assert (fault["outcome"], fault["replayed_steps"]) == ("recovered", None)
    assert fault["times_s"]["detect"] == 2.0
    assert [e["fault"]["outcome"] for e in head.events("recovered")] == ["recovered"]
    head.steps(5, 6).checkpoint(6).end(6).exported()
    assert head.status["state"] == "finished"
    assert head.journaled().count("job") == 1
    found = head.store.newest_verified()
    assert found is not None
    assert found.manifest.tokens_seen == 6000


def test_what_the_head_before_has_heard_already_is_not_counted_twice(open_head: Open) -> None:
    old = open_head().start().ready().steps(1, 4).checkpoint(4)
    head = open_head()
    take_over(head, all_of(old))
    head.steps(3, 5)  # sent again, because nobody knows what was taken
    head.write_shards(4, 0)
    head.write_shards(4, 1)
    head.controller.tick()
    assert [line["step"] for line in head.metrics()] == [1, 2, 3, 4, 5]
    assert head.events("checkpoint_failed") == []


def test_a_worker_that_died_meanwhile_is_replaced(open_head: Open) -> None:
    old = open_head().start().ready().steps(1, 3).checkpoint(2)
    head = open_head()
    found = all_of(old)
    del found[1]
    take_over(head, found)
    head.wait(10.0, beating=[0])
    first, second = head.status["faults"]
    assert (first["cause"], first["outcome"]) == ("head", "interrupted")
    assert (second["cause"], second["culprit"]["rank"]) == ("exit", 1)
    assert "while there was no head" in second["culprit"]["message"]
    assert head.group.assignments[0].sender.generation == 2


def test_workers_that_were_not_ready_begin_anew(open_head: Open) -> None:
    old = open_head().start()
    head = open_head()
    take_over(head, {a.sender.rank: adopted(a, ready=False) for a in old.group.assignments})
    assert head.status["state"] == "recovering"
    assert ("kill_all",) in head.group.calls
    assert head.group.assignments[0].sender.generation == 2


def test_without_workers_the_job_goes_on_from_its_checkpoint(open_head: Open) -> None:
    open_head().start().ready().steps(1, 3).checkpoint(2)
    head = open_head()
    take_over(head, {})
    assert head.group.assignments[0].start_step == 2
    head.ready().steps(3, 4)
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert (fault["outcome"], fault["replayed_steps"]) == ("recovered", [3, 3])


def test_a_last_checkpoint_that_went_with_the_head_is_written_again(open_head: Open) -> None:
    old = open_head().start().ready().steps(1, 6)
    old.write_shards(6, 0)
    head = open_head()
    ended = {
        rank: replace(
            worker, ended=RunEnded(sender=old.sender(rank), step=6, reason="finished")
        )
        for rank, worker in all_of(old).items()
    }
    take_over(head, ended)
    for rank in (0, 1):
        word = ended[rank].ended
        assert word is not None
        head.controller.handle(word)
    head.controller.tick()
    assert head.status["state"] == "recovering"
    assert head.group.assignments[0].sender.generation == 2


def test_a_budget_counts_over_heads(open_head: Open) -> None:
    old = open_head(max_restarts=1).start().ready().steps(1, 3)
    old.dies(0)
    old.wait(10.0)
    old.ready().steps(1, 4)
    head = open_head(max_restarts=1)
    take_over(head, all_of(old))
    head.dies(1)
    head.wait(10.0)
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 4)


def test_a_place_that_lost_its_device_is_known_to_the_next_head_and_not_to_a_resume(
    open_head: Open,
) -> None:
    old = open_head().start().ready().steps(1, 3)
    old.fails(1, "device", message="CUDA error: uncorrectable ECC error")
    old.wait(10.0)
    old.ready().steps(1, 4)
    head = open_head()
    take_over(head, all_of(old))
    head.fails(1, "device", message="CUDA error: uncorrectable ECC error")
    head.wait(10.0)
    assert [a.sender.rank for a in head.group.assignments] == [0]
    assert head.status["faults"][-1]["next"].endswith(
        "shrank to 1 worker(s): no device that works for rank 1"
    )
    assert {
        p: len(times) for p, times in replay(head.journal.entries).lost_devices.items()
    } == {1: 2}
    head.journal.append("job", job_id="j")
    assert replay(head.journal.entries).lost_devices == {}


def test_a_lost_device_that_is_told_to_the_next_head_once_more_is_one_loss(
    open_head: Open,
) -> None:
    old = open_head().start().ready().steps(1, 3)
    found = all_of(old)
    old.fails(1, "device", message="CUDA error: uncorrectable ECC error")
    head = open_head()
    take_over(head, found)
    head.fails(1, "device", message="CUDA error: uncorrectable ECC error")
    head.wait(10.0)
    assert [a.sender.rank for a in head.group.assignments] == [0, 1]
    assert {p: [*t] for p, t in replay(head.journal.entries).lost_devices.items()} == {1: [1]}


class FakeProcess:
    killed = 0

    def send(self, _: object) -> bool:
        FakeProcess.killed += 1
        return True


def test_a_head_that_does_not_answer_is_killed_and_a_paused_supervisor_is_no_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Callable[[object], None]] = []
    monkeypatch.setattr("deepopt.head.head_watch.find_process", lambda _: FakeProcess())
    watch = HeadWatch(asked.append, now_s=0.0)
    now_s = 0.0

    def go(duration_s: float, *, answers: bool) -> bool:
        nonlocal now_s
        killed = False
        for _ in range(round(duration_s / 0.5)):
            now_s += 0.5
            killed |= watch.look(now_s=now_s)
            while answers and asked:
                asked.pop()(4711)
        return killed

    assert not go(20.0, answers=True)
    now_s += 600.0  # the machine slept
    assert not go(TIMEOUT_S - 1.0, answers=False)
    asked.pop()(4711)
    assert not go(5.0, answers=True)
    assert go(TIMEOUT_S + 3.0, answers=False)
    assert not go(60.0, answers=False)  # once is enough


def test_a_head_that_shows_its_work_is_not_asked_and_one_that_ceases_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Callable[[object], None]] = []
    monkeypatch.setattr("deepopt.head.head_watch.find_process", lambda _: FakeProcess())
    monkeypatch.setattr("deepopt.head.head_watch.look_at", lambda _: ProcessLook(state="T"))
    watch = HeadWatch(asked.append, now_s=0.0)
    for half in range(4):  # its process id is in its first answer
        watch.look(now_s=half / 2, sign=half)
    assert len(asked) == 1
    asked.pop()(4711)

    for half in range(4, 100):
        assert not watch.look(now_s=half / 2, sign=half)
    assert not asked

    killed = [watch.look(now_s=49.5 + tenth / 10, sign=99) for tenth in range(60)]
    assert len(asked) == 1
    # Asked a second after the last sign, killed two seconds later, in tenths.
    assert 29 <= killed.index(True) <= 31


def test_a_head_that_a_signal_has_stopped_is_killed_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Callable[[object], None]] = []
    look = ProcessLook(state="S")
    monkeypatch.setattr("deepopt.head.head_watch.find_process", lambda _: FakeProcess())
    monkeypatch.setattr("deepopt.head.head_watch.look_at", lambda _: look)
    watch = HeadWatch(asked.append, now_s=0.0)

    def is_killed_at(now_s: float) -> bool:
        return watch.look(now_s=now_s)

    for tenth in range(15):
        is_killed_at(tenth / 10)
    asked.pop()(4711)
    times = [1.5 + tenth / 10 for tenth in range(50)]
    assert not any(map(is_killed_at, times))  # busy, or its GIL is held: the long deadline
    look = ProcessLook(state="t", tracer=7)
    assert not is_killed_at(6.5)
    look = ProcessLook(state="T")
    assert is_killed_at(6.6)
