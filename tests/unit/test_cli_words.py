"""A job in words: steps, status, failures, the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepopt_cli import words
from support.fake_supervisor import metrics, status, worker


def test_a_step_says_loss_speed_and_time_left() -> None:
    line = words.step_line(metrics(3), last_step=60, eta_s=90.0)
    assert line == (
        "step  3/60  loss 4.6250  grad norm 0.500  lr 3.00e-03  16.4k tokens/s  MFU 12.5 %  "
        "bubble 25 %  ETA 1:30"
    )


def test_a_loss_that_is_not_finite_is_said() -> None:
    line = words.step_line({"step": 3, "loss": None}, last_step=None, eta_s=None)
    assert line == "step 3  loss not finite"


def test_an_event_has_its_time_of_day() -> None:
    record = {
        "time": "2026-01-02T10:11:12.345+00:00",
        "kind": "warning",
        "message": "slow disk",
    }
    assert words.event_line(record) == "10:11:12 warning: slow disk"


def test_a_running_job_in_words() -> None:
    lines = words.status_lines(status(), supervisor_alive=True, age_s=0.4)
    assert lines == [
        "job         tiny (0123abcd)",
        "state       running (as of 0.4 s ago)",
        "step        3/5, loss 4.2500",
        "speed       12.3k tokens/s (6.17k a worker), MFU 12.3 %",
        "time left   12 s",
        "plan        mirror, bi_stream, plan 1, generation 1, 0 restarts",
        "bubble      38 %",
        "checkpoint  step 2",
    ]


def test_a_job_that_has_shrunk_says_how_many_workers_it_has_and_wants() -> None:
    lines = words.status_lines(
        {**status(), "workers_wanted": 3}, supervisor_alive=True, age_s=0.4
    )
    assert "workers     2 of 3: there is no device for the others" in lines


def test_a_job_whose_supervisor_died_is_not_called_running() -> None:
    lines = words.status_lines(status(), supervisor_alive=False, age_s=100.0)
    assert lines[1] == "state       recorded as running, but its supervisor is gone"
    assert not any(line.startswith("time left") for line in lines)


def test_heartbeats_age_with_the_status() -> None:
    header, first, _ = words.worker_table(status(), age_s=4.0).splitlines()
    assert (
        " ".join(header.split())
        == "rank host pid stages device state step action busy heartbeat"
    )
    assert " ".join(first.split()) == "0 host-a 4000 0-1 cpu running 3 1F2 75 % 4.2 s"


def test_a_worker_that_was_never_heard_has_no_age() -> None:
    silent = {**worker(0, stages=[0]), "heartbeat_age_s": None, "action": ""}
    row = words.worker_table(status(workers=[silent])).splitlines()[1]
    assert row.split()[-1] == "-"


def test_a_failure_shows_the_culprit_first_then_folds_the_victims() -> None:
    culprit = {
        "rank": 2,
        "host": "host-b",
        "pid": 77,
        "stages": [2],
        "step": 5,
        "action": "2F6",
        "message": "RuntimeError: boom",
        "traceback": "Traceback (most recent call last):\nRuntimeError: boom\n",
    }
    victims = [{"rank": rank, "message": "peer 2 is gone"} for rank in (0, 1, 3)]
    error = {"message": "rank 2 failed in step 5", "culprit": culprit, "victims": victims}
    assert words.failure_details(error, logs=Path("run/logs")).splitlines() == [
        "culprit  rank 2 on host-b, pid 77",
        "doing    step 5, stage 2, op F, micro-batch 6",
        "said     RuntimeError: boom",
        "log      run/logs/rank-2.log",
        "",
        "Traceback (most recent call last):",
        "RuntimeError: boom",
        "",
        "3 victims followed (ranks 0-1, 3): peer 2 is gone",
    ]


def test_a_culprit_between_actions_is_said_with_its_stages() -> None:
    culprit = {"rank": 0, "host": "a", "pid": 1, "stages": [0, 3], "step": 0, "action": ""}
    text = words.failure_details({"message": "x", "culprit": culprit}, logs=Path("logs"))
    assert "doing    before the first step, between actions; it holds stages 0, 3" in text


def test_a_single_stage_is_held_in_the_singular() -> None:
    culprit = {"rank": 0, "host": "a", "pid": 1, "stages": [3], "step": 2, "action": ""}
    text = words.failure_details({"message": "x", "culprit": culprit}, logs=Path("logs"))
    assert "doing    step 2, between actions; it holds stage 3" in text


@pytest.mark.parametrize(("exit_code", "shown"), [(1, False), (5, True), (None, True)])
def test_bad_input_is_told_without_a_traceback(exit_code: int | None, shown: bool) -> None:
    culprit = {
        "rank": 0,
        "host": "a",
        "pid": 1,
        "traceback": "Traceback: in deepopt's own lines",
    }
    error = {"message": "data.dataset: no dataset", "culprit": culprit}
    text = words.failure_details(error, logs=Path("logs"), exit_code=exit_code)
    assert ("Traceback" in text) is shown
    assert "log      logs/rank-0.log" in text


@pytest.mark.parametrize(
    ("schedule", "against"),
    [("1f1b", "1F1B on the split that is best in them"), ("searched", "1F1B")],
)
def test_1f1b_is_compared_with_itself_on_another_split(schedule: str, against: str) -> None:
    report = {"gain_over_1f1b": 0.9, "schedule": schedule, "placement": "line"}
    [line] = words.report_lines(report)
    assert f"0.900x the speed of {against}, simulated in" in line


def test_a_failure_without_a_culprit_has_no_details() -> None:
    assert words.failure_details({"message": "x", "culprit": None}, logs=Path("logs")) == ""


def test_a_finished_job_says_where_the_weights_are() -> None:
    report = {
        "measured_step_s": 0.2,
        "simulated_step_s": 0.19,
        "measured_bubble": 0.3,
        "simulated_bubble": 0.25,
        "shared_cores": 2,
    }
    ended = status(state="finished", step=5, checkpoint_step=5)
    assert words.closing_lines(ended, report=report, run_dir=Path("runs/a")) == [
        "finished at step 5 of 5, loss 4.2500",
        "  speed       12.3k tokens/s (6.17k a worker), MFU 12.3 %",
        "  step time   measured 200.0 ms, simulated 190.0 ms (-5.0 %)",
        "  bubble      measured 30 %, simulated 25 % (the workers share 2 cores)",
        "  checkpoint  step 5",
        "  weights     runs/a/final",
    ]


def test_a_prediction_says_what_the_warm_up_of_routers_takes_on_top() -> None:
    report = {
        "measured_step_s": 0.3,
        "predicted_step_s": 0.2,
        "prediction_error": 0.04,
        "predicted_warm_up_s": 0.09,
        "warm_up_steps": 3,
    }
    ended = status(state="finished", step=5, checkpoint_step=5)
    text = "\n".join(words.closing_lines(ended, report=report, run_dir=Path("runs/a")))
    assert (
        "measured 300.0 ms, predicted 200.0 ms and up to 90.0 ms more in the 3 steps in which routers "
        "warmed up (+4.0 %)" in text
    )
    text = "\n".join(
        words.closing_lines(
            ended, report={**report, "warm_up_steps": 0}, run_dir=Path("runs/a")
        )
    )
    assert "predicted 200.0 ms (+4.0 %)" in text


def test_a_stopped_job_says_how_to_go_on() -> None:
    lines = words.closing_lines(status(state="stopped"), report={}, run_dir=Path("runs/a"))
    assert lines[-1] == "  go on       deepopt resume runs/a"
