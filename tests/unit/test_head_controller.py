"""The controller with a fake worker group: what it decides, journals, asks for and shows."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepopt.cluster.group import AgentGone, WorkerUp
from deepopt.cluster.node_agent import ProcessEnded
from deepopt.cluster.process_look import ProcessLook
from deepopt.config import JobConfig
from deepopt.errors import CheckpointError, InputError
from deepopt.head import account
from deepopt.head.journal import replay
from deepopt.head.state import JobState
from deepopt.pipeline.weight_ways import Verdict, Way
from deepopt.worker.messages import Sender, StepReport, WeightWork
from support.head_fakes import HeadUnderTest, make_plan

Open = Callable[..., HeadUnderTest]


@pytest.fixture
def open_head(tmp_path: Path) -> Iterator[Open]:
    opened: list[HeadUnderTest] = []

    def open_head(
        *, steps: int = 6, num_groups: int = 2, **faults: float | str
    ) -> HeadUnderTest:
        if opened:
            opened[-1].close()
        job = JobConfig.model_validate(
            {
                "training": {"steps": steps},
                "checkpoint": {"every": 2},
                "faults": {"survivor_timeout_s": 0.5, **faults},
            }
        )
        head = HeadUnderTest(tmp_path / "run", job=job, plan=make_plan(num_groups=num_groups))
        opened.append(head)
        return head

    yield open_head
    for head in opened:
        head.close()


def test_a_job_runs_from_start_to_final_weights(open_head: Open) -> None:
    head = open_head().start()
    assert head.status["state"] == "starting"
    assert [w["state"] for w in head.status["workers"]] == ["starting", "starting"]
    head.ready()
    assert head.status["state"] == "running"
    head.steps(1, 6).checkpoint(6).end(6)
    assert ("export", 0, "step-00000006") in head.group.calls
    assert head.controller.outcome is None
    head.exported()
    status = head.status
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 6)
    assert head.group.calls[-1] == ("kill_all",)
    assert head.journaled() == [
        "job",
        "plan",
        "state:starting",
        "generation",
        "state:running",
        "checkpoint",
        "state:finished",
    ]


def test_the_generation_is_journaled_before_its_workers_are_launched(open_head: Open) -> None:
    head = open_head()
    journaled: list[list[str]] = []
    launch = head.group.launch

    def note_and_launch(assignments: list) -> None:  # type: ignore[type-arg]
        journaled.append(head.journaled())
        launch(assignments)

    head.group.launch = note_and_launch  # type: ignore[method-assign,assignment]
    head.start()
    assert journaled == [["job", "plan", "state:starting", "generation"]]


def test_processes_are_started_before_checkpoints_are_verified(open_head: Open) -> None:
    head = open_head().start()
    assert head.group.calls == [("prepare", 1, 2), ("launch", 1)]


def test_a_step_is_measured(open_head: Open) -> None:
    head = open_head().start().ready()
    head.step(1, loss=1 / 3)
    (line,) = head.metrics()
    assert line["loss"] == 1 / 3
    assert line["tokens_per_s"] == 2000.0
    assert line["tokens_per_s_per_worker"] == 1000.0
    assert line["bubble"] == 0.5
    # 3 x 4 layers x 8 FLOP a token x 2000 tokens/s of a peak of 2 x 1e6 FLOP/s
    assert line["mfu"] == pytest.approx(0.096)
    assert (line["generation"], line["compute_s"]) == (1, [0.25, 0.25])
    head.wait(0.5)
    assert head.status["eta_s"] == 2.5
    assert head.status["stage_busy"] == {"0": 0.5, "1": 0.5}
    assert (head.status["loss"], head.status["step"]) == (1 / 3, 1)


def test_workers_are_shown_with_pid_host_stages_and_the_age_of_their_sign(
    open_head: Open,
) -> None:
    head = open_head().start().ready()
    head.beat(1, step=3, progress=5, action="1F2")
    head.wait(1.0, beating=[0])
    worker = head.status["workers"][1]
    assert (worker["pid"], worker["host"], worker["stages"]) == (101, "alpha", [1])
    assert (worker["step"], worker["action"], worker["state"]) == (3, "1F2", "running")
    assert worker["heartbeat_age_s"] == pytest.approx(1.0, abs=0.5)


def test_an_evaluation_is_as_far_as_its_last_forwards_on_all_workers(open_head: Open) -> None:
    head = open_head().start().ready()
    head.beat(0, step=3, action="1F7", evaluation=(4, 12))
    head.beat(1, step=3, action="1F2", evaluation=(3, 12))
    head.wait(0.5)
    assert head.status["evaluation"] == {"begun": 7, "total": 12}
    for rank in (0, 1):
        head.beat(rank, step=3)
    head.wait(0.5)
    assert head.status["evaluation"] is None


def test_the_status_is_written_at_most_twice_a_second(open_head: Open) -> None:
    head = open_head().start().ready()
    before = head.run.status.stat().st_mtime_ns
    for _ in range(4):
        head.clock.now_s += 0.1
        head.controller.tick()
    assert head.run.status.stat().st_mtime_ns == before
    head.clock.now_s += 0.2
    head.controller.tick()
    assert head.run.status.stat().st_mtime_ns > before


# --- checkpoints -----------------------------------------------------------------------------


def test_a_checkpoint_is_committed_when_all_writers_have_spoken(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2)
    head.write_shards(2, 0)
    head.controller.tick()
    assert head.events("checkpoint") == []
    head.write_shards(2, 1)
    head.controller.tick()
    (event,) = head.events("checkpoint")
    assert event["step"] == 2
    found = head.store.newest_verified()
    assert found is not None
    assert (found.manifest.step, found.manifest.tokens_seen) == (2, 2000)
    head.wait(0.5)
    assert head.status["checkpoint_step"] == 2


def test_a_long_launch_forgets_steps_long_past_and_still_counts_their_tokens(
    open_head: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "COUNTS_KEPT", 3)
    head = open_head().start().ready().steps(1, 6).checkpoint(6).end(6)
    head.exported()
    found = head.store.newest_verified()
    assert found is not None
    assert found.manifest.tokens_seen == 6000
    (record,) = head.reports
    assert record.tokens_seen == {4: 4000, 5: 5000, 6: 6000}


def test_a_checkpoint_that_cannot_be_written_is_named_and_training_goes_on(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 2)
    head.write_shards(2, 0)
    head.checkpoint_fails(2, 1, "no space left on device")
    head.controller.tick()
    (event,) = head.events("checkpoint_failed")
    assert (event["step"], event["rank"], event["reason"]) == (2, 1, "no space left on device")
    assert head.controller.state is JobState.RUNNING
    assert not list(head.run.checkpoints.glob("*.tmp"))
    head.steps(3, 4).checkpoint(4)
    assert [e["step"] for e in head.events("checkpoint")] == [4]


def test_what_a_worker_found_out_about_weight_gradients_is_an_event(open_head: Open) -> None:
    head = open_head().start().ready()
    notes = ("layer 3 (conv, ConvBlock): split for first.weight",)
    head.controller.handle(WeightWork(sender=head.sender(1), notes=notes))
    (event,) = head.events("weight_work")
    assert (event["rank"], event["generation"]) == (1, 1)
    assert event["notes"] == list(notes)
    assert head.controller.state is JobState.RUNNING


def test_what_is_known_of_weight_gradients_is_told_to_the_next_group_and_is_no_event_without_notes(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 2)
    for rank, layer in enumerate(("embed", "head")):
        ways = {layer: Verdict(way=Way.DEFERRED)}
        sender = head.sender(rank)
        head.controller.handle(
            WeightWork(sender=sender, notes=(), conditions="CPU X", ways=ways)
        )
    assert head.events("weight_work") == []
    head.controller.handle(WeightWork(sender=sender, notes=(), conditions="CPU X", ways=ways))
    assert head.journaled().count("weight_work") == 2  # what is known is not written again
    head.dies(1)
    head.wait(0.75)
    assert [dict(a.known_ways) for a in head.group.assignments] == 2 * [
        {"CPU X": {name: Verdict(way=Way.DEFERRED) for name in ("embed", "head")}}
    ]


def test_a_later_launch_knows_what_workers_found_of_weight_gradients(open_head: Open) -> None:
    ways = {"embed": Verdict(way=Way.SPLIT, split=frozenset({"weight"}), code="c")}
    head = open_head().start().ready().steps(1, 2)
    head.controller.handle(
        WeightWork(sender=head.sender(0), notes=(), conditions="CPU X", ways=ways)
    )
    head.journal.append("job", job_id="j")
    assert replay(head.journal.entries).weight_ways == {"CPU X": ways}
    head.close()
    later = open_head().start()
    assert [dict(a.known_ways) for a in later.group.assignments] == 2 * [{"CPU X": ways}]


def test_a_job_whose_last_checkpoint_failed_does_not_call_itself_finished(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 4).checkpoint(4).steps(5, 6)
    head.checkpoint_fails(6, 0, "no space left on device")
    head.checkpoint_fails(6, 1, "no space left on device")
    head.end(6)
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 1)
    assert "the newest whole one is of step 4" in head.status["error"]["message"]


def test_an_export_that_fails_is_named(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 6).checkpoint(6).end(6)
    head.exported(None, "no space left on device")
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 1)
    assert "no space left on device" in head.status["error"]["message"]


def test_a_worker_that_dies_while_it_exports_is_replaced_and_exports_again(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 6).checkpoint(6).end(6)
    head.dies(1)  # its work is done
    assert head.events("worker_lost") == []
    head.dies(0)
    head.wait(0.5)
    assert head.group.assignments[0].start_step == 6
    head.ready().end(6).exported()
    assert (head.status["state"], head.status["restarts"]) == ("finished", 1)


def test_a_report_that_fails_does_not_hide_the_end(
    open_head: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = open_head().start().ready().steps(1, 6).checkpoint(6).end(6)

    def fail(content: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(head.board, "report", fail)
    head.exported()
    assert head.status["state"] == "finished"
    assert "no closing report" in head.events("warning")[0]["message"]


# --- losses ----------------------------------------------------------------------------------


def test_a_dead_worker_is_replaced_from_the_newest_checkpoint(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3).checkpoint(2)
    old = head.sender(0)
    head.dies(1)
    assert head.controller.state is JobState.RUNNING  # others may still speak
    assert [w["state"] for w in head.status["workers"]] == ["running", "lost"]
    head.wait(0.5)
    assert head.status["state"] == "recovering"
    assert head.group.calls[-3:] == [("kill_all",), ("prepare", 2, 2), ("launch", 2)]
    new = head.group.assignments[0]
    assert (new.sender.generation, new.start_step) == (2, 2)
    assert new.checkpoint is not None
    assert Path(new.checkpoint).name == "step-00000002"
    assert new.sender.incarnation != old.incarnation
    head.ready()
    head.wait(0.5)
    assert (head.status["state"], head.status["restarts"]) == ("running", 1)
    head.steps(3, 6).checkpoint(6).end(6).exported()
    assert head.status["state"] == "finished"
    assert [line["step"] for line in head.metrics()] == [1, 2, 3, 3, 4, 5, 6]
    found = head.store.newest_verified()
    assert found is not None
    assert found.manifest.tokens_seen == 6000


def test_without_a_checkpoint_the_job_begins_again(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 1)
    head.dies(0)
    head.wait(0.5)
    assert head.group.assignments[0].checkpoint is None
    assert head.group.assignments[0].start_step == 0


def test_the_verdict_waits_for_the_culprit_and_folds_the_victims(open_head: Open) -> None:
    head = open_head(max_restarts=0, survivor_timeout_s=3.0).start().ready()
    head.fails(0, "peer")
    head.wait(1.0, beating=[1])
    assert head.controller.outcome is None
    head.dies(1, "killed by SIGKILL")
    head.wait(0.5)
    error = head.status["error"]
    assert head.status["exit_code"] == 4
    assert (error["culprit"]["rank"], error["culprit"]["stages"]) == (1, [1])
    assert [victim["rank"] for victim in error["victims"]] == [0]
    assert "killed by SIGKILL" in error["message"]


def test_a_dead_worker_is_shown_with_the_action_it_was_in(open_head: Open) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.beat(1, step=3, progress=7, action="1B2")
    head.dies(1)
    head.wait(0.5)
    culprit = head.status["error"]["culprit"]
    assert (culprit["step"], culprit["action"], culprit["pid"]) == (3, "1B2", 101)


def test_a_sign_older_than_the_last_step_does_not_say_the_action(open_head: Open) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.beat(1, step=3, progress=7, action="1B2")
    head.steps(1, 3)
    head.dies(1)
    head.wait(0.5)
    culprit = head.status["error"]["culprit"]
    assert (culprit["step"], culprit["action"]) == (4, "")


def test_an_error_of_the_model_fails_the_job_at_once(open_head: Open) -> None:
    head = open_head().start().ready()
    head.fails(1, "error", message="loss is nan", traceback="Traceback ...", exit_code=5)
    head.fails(0, "peer")
    head.controller.tick()  # every worker is accounted for: nothing to wait for
    status = head.status
    assert (status["state"], status["exit_code"], status["restarts"]) == ("failed", 5, 0)
    assert status["error"]["culprit"]["traceback"] == "Traceback ..."
    assert head.events("error")[0]["message"] == status["error"]["message"]


def test_a_budget_of_restarts_is_kept(open_head: Open) -> None:
    head = open_head(max_restarts=2).start()
    for generation in (1, 2, 3):
        assert head.group.assignments[0].sender.generation == generation
        head.ready()
        head.dies(0)
        head.wait(2.0)
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 4)
    assert head.status["restarts"] == 2


def test_faults_far_apart_do_not_use_up_the_budget(open_head: Open) -> None:
    head = open_head(steps=60, max_restarts=2, window_s=100.0).start()
    for number in range(1, 11):
        head.ready().steps(1, number)
        head.dies(0)
        head.wait(1.0)
        head.wait(60.0, beating=[0, 1])
        assert head.status["faults"][-1]["budget"] == "worker"
    assert head.status["state"] == "recovering"
    assert "0 more worker fault(s)" in head.status["faults"][-1]["next"]


def test_a_recovery_that_brought_no_new_step_is_not_repeated_at_once(open_head: Open) -> None:
    head = open_head(max_restarts=9).start().ready().steps(1, 3)
    waited = []
    for _ in range(5):
        head.dies(0)
        before_s = head.clock.now_s
        generation = head.sender(0).generation
        while head.sender(0).generation == generation:
            head.wait(0.25)
        waited.append(head.clock.now_s - before_s)
        head.ready()
    assert waited == [0.5, 0.5, 1.0, 2.0, 4.0]
    head.steps(1, 4)
    head.dies(0)
    head.wait(0.5)
    assert head.sender(0).generation == 7


def test_a_resume_begins_with_the_whole_budget_and_a_new_head_does_not(open_head: Open) -> None:
    head = open_head(max_restarts=1).start().ready().steps(1, 2)
    head.dies(0)
    head.wait(0.5)
    head.ready().steps(1, 3)
    assert replay(head.journal.entries).counting == {1}
    head.dies(0)
    head.wait(0.5)
    assert head.status["state"] == "failed"
    head = open_head(max_restarts=1).start().ready()
    assert replay(head.journal.entries).counting == frozenset()
    head.dies(0)
    head.wait(0.5)
    assert head.status["state"] == "recovering"


def test_a_host_that_fails_again_and_again_is_named_once(open_head: Open) -> None:
    head = open_head(bad_host_after=2).start().ready().steps(1, 2)
    head.dies(0)
    head.wait(0.5)
    head.ready().steps(1, 3)
    assert not [e for e in head.events("warning") if "alpha" in e["message"]]
    head.dies(1)
    head.wait(0.5)
    (warning,) = [e for e in head.events("warning") if "alpha" in e["message"]]
    assert "2 faults or more: alpha" in warning["message"]
    head.ready().steps(3, 4)
    head.dies(0)
    head.wait(0.5)
    assert len([e for e in head.events("warning") if "alpha" in e["message"]]) == 1  # once


def test_a_silent_worker_is_suspect_then_killed_and_replaced(open_head: Open) -> None:
    head = open_head(heartbeat_timeout_s=3.0).start().ready().steps(1, 5)
    head.wait(1.25, beating=[0])
    assert [w["state"] for w in head.status["workers"]] == ["running", "suspect"]
    assert ("kill", 1) not in head.group.calls
    head.wait(2.0, beating=[0])
    assert ("kill", 1) in head.group.calls
    head.wait(0.5, beating=[0])
    assert head.controller.state is JobState.RECOVERING
    (lost,) = head.events("worker_lost")
    assert (lost["rank"], lost["failure"]) == (1, "hang")
    assert "faults.heartbeat_timeout_s 3" in lost["message"]


def test_a_stopped_worker_is_killed_at_its_agents_word(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 5)
    head.agent(looks={0: ProcessLook(state="S"), 1: ProcessLook(state="T")})
    head.wait(1.25, beating=[0])
    head.agent(looks={0: ProcessLook(state="S"), 1: ProcessLook(state="T")})
    head.wait(0.25, beating=[0])
    assert ("kill", 1) in head.group.calls
    head.wait(0.5, beating=[0])
    (fault,) = head.status["faults"]
    assert (fault["cause"], fault["culprit"]["rank"]) == ("stopped", 1)
    assert "its process is stopped by a signal" in fault["culprit"]["message"]
    assert fault["times_s"]["detect"] == 1.25


def test_an_agent_that_ends_or_falls_silent_is_replaced(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 5)
    head.agent(looks={0: ProcessLook(state="S"), 1: ProcessLook(state="S")})
    head.wait(6.0, beating=[0, 1])
    assert head.group.calls.count(("renew_agent", "alpha")) == 1
    head.controller.handle(AgentGone(host="alpha"))
    assert head.group.calls.count(("renew_agent", "alpha")) == 2
    assert [event["message"] for event in head.events("warning")] == [
        "the agent on alpha has been silent for 5 s: another one is started",
        "the agent on alpha has ended: another one is started",
    ]


def test_a_group_that_fails_together_does_not_write_the_status_for_each_of_its_workers(
    open_head: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = open_head().start().ready().steps(1, 5)
    forced: list[bool] = []
    monkeypatch.setattr(head.board, "show", lambda *_, force=False, **__: forced.append(force))
    head.dies(1)
    head.fails(0, kind="peer")
    assert forced.count(True) == 1


def test_an_exit_that_the_agent_tells_names_the_signal(open_head: Open) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.exits(1, "killed by SIGKILL")
    assert ("confirm_exit", 1, "killed by SIGKILL") in head.group.calls
    head.dies(1, "its process was killed by SIGKILL")
    head.wait(0.5)
    assert head.status["error"]["culprit"]["message"] == "its process was killed by SIGKILL"


def test_an_agents_word_that_comes_after_ray_s_still_names_the_signal(open_head: Open) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.dies(1, "its process is gone: killed, or out of memory")
    head.exits(1, "killed by SIGSEGV")
    head.wait(0.5)
    assert head.status["error"]["culprit"]["message"] == "its process was killed by SIGSEGV"


def test_recovery_does_not_wait_for_the_agents_word_and_the_report_takes_it(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 2)
    head.fails(0, kind="peer")
    head.dies(1, "its process is gone: killed, or out of memory")
    head.controller.tick()
    assert head.sender(0).generation == 2  # formed at once
    head.exits(1, "killed by SIGKILL")
    head.ready().steps(3, 3)
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert fault["outcome"] == "recovered"
    assert fault["culprit"]["message"] == "its process was killed by SIGKILL"


def test_an_agents_word_that_comes_when_the_recovery_is_over_still_names_the_signal(
    open_head: Open,
) -> None:
    head = open_head().start().ready().steps(1, 2)
    head.fails(0, kind="peer")
    head.dies(1, "its process is gone: killed, or out of memory")
    head.controller.tick()
    head.ready().steps(3, 3)
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert fault["outcome"] == "recovered"
    old_pid = fault["culprit"]["pid"]
    for assignment in head.group.assignments:  # the new processes have ids of their own
        rank = assignment.sender.rank
        head.controller.handle(
            WorkerUp(
                generation=assignment.sender.generation, rank=rank, pid=200 + rank, host="alpha"
            )
        )
    word = ProcessEnded(host="alpha", pid=old_pid, how="killed by SIGKILL")
    head.controller.handle(word)
    (named,) = head.status["faults"]
    assert named["culprit"]["message"] == "its process was killed by SIGKILL"
    assert {**named, "culprit": 0, "times_s": 0} == {**fault, "culprit": 0, "times_s": 0}
    (journaled,) = replay(head.journal.entries).faults.values()
    assert journaled == named


def test_a_job_that_ends_waits_a_moment_for_the_agents_word(open_head: Open) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.fails(0, kind="peer")
    head.dies(1, "its process is gone: killed, or out of memory")
    head.controller.tick()
    assert head.controller.outcome is None
    head.exits(1, "killed by SIGKILL")
    head.controller.tick()
    assert head.status["error"]["culprit"]["message"] == "its process was killed by SIGKILL"


def test_a_job_that_ends_waits_no_longer_for_an_agent_that_says_nothing(
    open_head: Open,
) -> None:
    head = open_head(max_restarts=0).start().ready()
    head.fails(0, kind="peer")
    head.dies(1, "its process is gone: killed, or out of memory")
    head.wait(0.5)
    assert head.status["state"] == "failed"


def test_processes_of_others_are_not_taken_for_workers(open_head: Open) -> None:
    head = open_head().start().ready()
    head.controller.handle(ProcessEnded(host="beta", pid=101, how="killed by SIGKILL"))
    head.controller.handle(ProcessEnded(host="alpha", pid=7, how="killed by SIGKILL"))
    assert not [call for call in head.group.calls if call[0] == "confirm_exit"]


def test_a_fault_is_reported_with_its_times_and_what_it_cost(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3).checkpoint(2)
    head.beat(1, step=4, progress=9, action="1F2")
    head.clock.now_s += 0.25
    head.dies(1, "its process was killed by SIGKILL")
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert (fault["outcome"], fault["cause"]) == ("open", "exit")
    assert (fault["culprit"]["rank"], fault["culprit"]["stages"]) == (1, [1])
    assert (fault["culprit"]["step"], fault["culprit"]["action"]) == (4, "1F2")
    assert fault["next"].startswith("generation 2 begins; 2 more worker fault(s) allowed")
    assert [e["fault"]["number"] for e in head.events("fault")] == [1]
    head.wait(2.0)
    head.ready(load_s=0.75)
    head.wait(1.0, beating=[0, 1])
    head.step(3)  # done before the fault: the recovery is not over
    head.wait(0.5)
    assert head.status["faults"][0]["outcome"] == "open"
    head.step(4)
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert (fault["outcome"], fault["replayed_steps"]) == ("recovered", [3, 3])
    assert fault["source"] == "checkpoint"
    times = fault["times_s"]
    assert (times["detect"], times["decide"], times["restore"]) == (0.0, 0.5, 0.75)
    assert (times["rendezvous"], times["replay"], times["total"]) == (1.25, 1.5, 4.0)
    assert [e["fault"]["outcome"] for e in head.events("recovered")] == ["recovered"]
    kinds = [kind for kind in head.journaled() if kind in ("fault", "generation", "recovered")]
    assert kinds == ["generation", "fault", "generation", "recovered"]


@pytest.mark.parametrize("before", [(), ("peer",), ("ray",), ("peer", "ray")])
def test_a_death_is_detected_from_the_moment_in_which_the_agent_saw_it(
    before: tuple[str, ...], open_head: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha")
    head = open_head().start().ready().steps(1, 3)
    head.clock.now_s += 0.25  # since the last heartbeat
    died_s = head.clock.now_s
    for word in before:
        head.clock.now_s += 0.125
        if word == "peer":
            head.fails(0, "peer")
        else:
            head.dies(1, "its process is gone")
    noticed_s = died_s + (0.125 if before else 0.03125)
    head.clock.now_s = max(head.clock.now_s, noticed_s)
    head.controller.handle(
        ProcessEnded(host="alpha", pid=101, how="killed by SIGKILL", at_s=died_s)
    )
    if "ray" not in before:  # the agent's word has the group tell of it
        head.dies(1, "its process was killed by SIGKILL")
    head.wait(0.5)
    (fault,) = head.status["faults"]
    assert fault["times_s"]["detect"] == pytest.approx(noticed_s - died_s, abs=1e-3)


def test_a_fault_during_recovery_is_the_next_fault(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3)
    head.dies(1)
    head.wait(0.5)
    head.dies(0)
    head.wait(0.5)
    head.ready().steps(1, 4)
    head.wait(0.5)
    faults = head.status["faults"]
    assert [f["outcome"] for f in faults] == ["interrupted", "recovered"]
    assert [f["culprit"]["rank"] for f in faults] == [1, 0]
    assert faults[1]["step_done"] == 3


def test_faults_of_earlier_launches_stay_in_the_report(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2).checkpoint(2)
    head.dies(1)
    head.wait(0.5)
    head.ready().steps(3, 3)
    head.controller.request_kill()
    head = open_head().start().ready()
    head.dies(0)
    head.wait(0.5)
    assert [(f["number"], f["outcome"]) for f in head.status["faults"]] == [
        (1, "recovered"),
        (2, "open"),
    ]


def test_a_suspect_is_the_culprit_when_its_peers_fail(open_head: Open) -> None:
    head = open_head(heartbeat_timeout_s=9.0, max_restarts=0).start().ready()
    head.wait(3.5, beating=[0])
    head.fails(0, "peer")
    head.wait(3.0)
    assert head.status["error"]["culprit"]["rank"] == 1
    assert head.status["error"]["culprit"]["kind"] == "hang"


def test_a_worker_that_was_suspect_and_speaks_again_is_not_killed(open_head: Open) -> None:
    head = open_head(heartbeat_timeout_s=3.0).start().ready()
    head.wait(2.5, beating=[0])
    head.wait(2.5, beating=[0, 1])
    assert [w["state"] for w in head.status["workers"]] == ["running", "running"]
    assert head.events("worker_lost") == []


def test_a_pause_of_the_head_is_not_blamed_on_workers(open_head: Open) -> None:
    head = open_head(heartbeat_timeout_s=3.0, setup_timeout_s=10.0).start().ready()
    head.clock.now_s += 600.0
    head.wait(1.0)
    assert head.events("worker_lost") == []


def test_workers_that_stand_still_are_ended_by_the_one_that_computes(open_head: Open) -> None:
    head = open_head(step_timeout_s=2.0).start().ready()
    for _ in range(10):
        head.clock.now_s += 0.25
        head.beat(0, step=3, progress=5, action="0RECV_B1")
        head.beat(1, step=3, progress=9, action="1B1")
        head.controller.tick()
    assert ("kill", 1) in head.group.calls
    assert "no progress for" in head.events("worker_lost")[0]["message"]


def test_a_worker_that_is_not_ready_in_time_is_killed(open_head: Open) -> None:
    head = open_head(setup_timeout_s=5.0, max_restarts=0).start()
    head.wait(5.5)
    head.wait(0.5)
    assert head.status["error"]["culprit"]["message"].startswith("has no process after 5 s")


def test_a_start_that_fails_ends_the_job_with_the_code_of_its_error(open_head: Open) -> None:
    head = open_head().start()
    head.fails(0, "setup", exit_code=1, remedy="name a file that exists")
    head.wait(0.5)
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 1)
    assert head.status["error"]["remedy"] == "name a file that exists"


def test_a_zombie_of_an_earlier_generation_is_refused_once_by_name(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 1)
    zombie = head.sender(0)
    head.dies(1)
    head.wait(0.5)
    head.ready()
    for step in (2, 3):
        head.controller.handle(
            StepReport(
                sender=zombie,
                step=step,
                loss=9.0,
                grad_norm=0.0,
                learning_rate=0.0,
                tokens=1,
                step_time_s=1.0,
                workers=(),
            )
        )
    (event,) = head.events("message_refused")
    assert (event["rank"], event["generation"], event["current_generation"]) == (0, 1, 2)
    assert event["message"] == "StepReport"
    assert all(line["loss"] != 9.0 for line in head.metrics())


@pytest.mark.parametrize("field", ["job_id", "incarnation", "plan_id"])
def test_a_stranger_of_the_same_generation_is_refused(open_head: Open, field: str) -> None:
    head = open_head().start().ready()
    known = head.sender(0)
    fields = {name: getattr(known, name) for name in Sender.__slots__}
    stranger = Sender(**{**fields, field: 99 if field == "plan_id" else "stranger"})
    head.group.assignments[0] = head.group.assignments[1]
    head.controller.handle(
        StepReport(
            sender=stranger,
            step=1,
            loss=1.0,
            grad_norm=0.0,
            learning_rate=0.0,
            tokens=1,
            step_time_s=1.0,
            workers=(),
        )
    )
    assert head.metrics() == []
    assert len(head.events("message_refused")) == 1


def test_workers_that_cannot_be_killed_fail_the_job(open_head: Open) -> None:
    head = open_head().start().ready()
    head.group.immortal = True
    head.dies(0)
    head.clock.now_s += 0.5
    with pytest.raises(Exception, match="rank 1 does not die") as caught:
        head.controller.tick()
    head.controller.fail(caught.value)  # type: ignore[arg-type]
    assert (head.status["state"], head.status["exit_code"]) == ("failed", 3)


# --- stop and resume -------------------------------------------------------------------------


def test_a_stop_lets_the_step_end_and_takes_a_checkpoint(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3)
    head.controller.request_stop()
    assert head.status["state"] == "stopping"
    assert head.group.calls[-1] == ("stop",)
    assert head.journaled()[-2:] == ["stop", "state:stopping"]
    head.checkpoint(3).end(3, "stopped")
    status = head.status
    assert (status["state"], status["exit_code"], status["checkpoint_step"]) == (
        "stopped",
        0,
        3,
    )
    assert head.events("warning") == []


def test_workers_that_do_not_stop_are_killed_after_the_grace_time(open_head: Open) -> None:
    head = open_head(stop_grace_s=4.0).start().ready().steps(1, 2).checkpoint(2)
    head.controller.request_stop()
    head.wait(4.25, beating=[0, 1])
    assert (head.status["state"], head.status["checkpoint_step"]) == ("stopped", 2)
    assert head.group.calls[-1] == ("kill_all",)


def test_a_preempted_job_saves_within_the_grace_time_and_can_be_resumed(
    open_head: Open,
) -> None:
    head = open_head(grace_s=4.0, stop_grace_s=90.0).start().ready().steps(1, 3)
    head.preempted(1)
    assert head.status["state"] == "stopping"
    assert head.group.calls[-1] == ("stop",)
    (asked,) = head.events("stop_requested")
    assert (asked["request"], asked["who"]) == ("preempt", "rank 1 on alpha")
    head.preempted(1)  # some launchers send it again and again
    head.checkpoint(3).end(3, "stopped")
    assert (head.status["state"], head.status["checkpoint_step"]) == ("stopped", 3)
    head = open_head(grace_s=4.0).start().ready().steps(4, 4)
    head.controller.request_stop(preempted="the job")
    head.wait(4.25, beating=[0, 1])
    assert (head.status["state"], head.status["exit_code"]) == ("stopped", 0)
    assert "faults.grace_s (4 s)" in head.events("warning")[-1]["message"]


def test_a_job_that_goes_on_saves_and_replaces_the_preempted_worker(open_head: Open) -> None:
    head = open_head(max_restarts=0, max_preemptions=1).start().ready().steps(1, 3)
    assert head.job.faults.on_preemption == "stop"
    head = open_head(max_restarts=0, on_preemption="go_on").start().ready().steps(1, 3)
    head.preempted(1)
    assert head.group.calls[-1] == ("checkpoint",)
    assert head.status["state"] == "running"
    head.dies(1)
    head.wait(0.5)
    assert head.status["state"] == "recovering"
    assert head.status["faults"][-1]["budget"] == "preemption"


def test_a_stop_before_the_workers_are_ready_ends_at_once(open_head: Open) -> None:
    head = open_head().start()
    head.controller.request_stop()
    assert (head.status["state"], head.status["exit_code"]) == ("stopped", 0)


def test_a_worker_lost_while_stopping_is_not_replaced(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2)
    head.controller.request_stop()
    head.dies(0)
    head.wait(0.5)
    assert (head.status["state"], head.status["generation"]) == ("stopped", 1)
    assert "lost while stopping" in head.events("warning")[0]["message"]


def test_a_stop_at_the_last_step_is_a_finish(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 6)
    head.controller.request_stop()
    head.checkpoint(6).end(6, "stopped").exported()
    assert head.status["state"] == "finished"


def test_a_kill_ends_at_once(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 3)
    head.controller.request_kill()
    assert (head.status["state"], head.status["exit_code"]) == ("stopped", 130)
    assert head.group.calls[-1] == ("kill_all",)


def test_a_resumed_job_continues_generation_step_and_tokens(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2).checkpoint(2)
    head.controller.request_kill()
    head = open_head(steps=8).start()
    (assignment, _) = head.group.assignments
    assert assignment.sender.generation == 2
    assert (assignment.start_step, assignment.last_step) == (2, 8)
    head.ready().steps(3, 8).checkpoint(8).end(8).exported()
    assert head.status["state"] == "finished"
    found = head.store.newest_verified()
    assert found is not None
    assert found.manifest.tokens_seen == 8000
    assert [e.fields["job_id"] for e in head.journal.entries if e.kind == "job"] == [
        "job-1"
    ] * 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 4).checkpoint(2).checkpoint(4)
    head.controller.request_kill()
    shard = next((head.run.checkpoints / "step-00000004").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    head = open_head().start()
    assert head.group.assignments[0].start_step == 2
    (event,) = head.events("checkpoint_failed")
    assert event["step"] == 4
    assert shard.name in event["reason"]


def test_a_job_without_any_usable_checkpoint_is_refused(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2).checkpoint(2)
    head.controller.request_kill()
    for file in (head.run.checkpoints / "step-00000002").iterdir():
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        open_head().start()


def test_other_gradient_groups_than_at_the_first_launch_are_refused(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2).checkpoint(2)
    head.controller.request_kill()
    with pytest.raises(InputError, match="2 gradient groups, the plan has 4"):
        open_head(num_groups=4).start()


def test_hosts_with_different_data_are_refused_by_name(open_head: Open) -> None:
    head = open_head().start().ready(data=("text", "newer text"))
    status = head.status
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert "rank 1 on alpha reads other data" in status["error"]["message"]


def test_a_resume_with_other_data_than_before_is_refused(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 2).checkpoint(2)
    head.controller.request_kill()
    head = open_head().start().ready(data=("other", "other"))
    assert head.status["state"] == "failed"
    assert "expected text" in head.status["error"]["message"]


def test_fewer_steps_than_are_done_are_refused(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 4).checkpoint(4)
    head.controller.request_kill()
    with pytest.raises(InputError, match="at step 4, beyond the last step asked for, 3"):
        open_head(steps=3).start()


def test_a_finished_job_can_be_resumed_without_more_steps(open_head: Open) -> None:
    head = open_head().start().ready().steps(1, 6).checkpoint(6).end(6)
    head.exported(None, "no space left on device")
    head = open_head().start().ready()
    head.end(6).exported()
    assert head.status["state"] == "finished"


def test_a_disk_that_refuses_the_status_does_not_stop_training(
    open_head: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = open_head().start().ready()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deepopt.head.board.write_json_atomic", refuse)
    head.steps(1, 6).checkpoint(6).end(6).exported()
    assert head.controller.outcome is not None
    assert head.controller.outcome.exit_code == 0
