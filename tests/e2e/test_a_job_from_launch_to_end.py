"""Whole jobs as a user runs them: the numbers, kills, stops, resumes, and what stays behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from deepopt.job_file import load_job
from support import launcher
from support.worker_processes import losses_of, make_plan

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one worker that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = launcher.write_job(folder)
    result = launcher.run("launch", job, "--workers", 1, "--run-dir", folder / "run")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run"


def test_a_run_directory_holds_all_of_a_finished_job(unbroken: Path) -> None:
    content = launcher.status(unbroken)
    assert (content["state"], content["step"], content["exit_code"]) == ("finished", 8, 0)
    for name in ("job.yaml", "model.json", "plan.json", "journal.jsonl", "report.json"):
        assert (unbroken / name).is_file(), name
    assert list((unbroken / "tensorboard").glob("events.*"))
    assert (unbroken / "final" / "model.safetensors").is_file()
    line = json.loads((unbroken / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "tokens_per_s", "tokens_per_s_per_worker", "mfu"} <= set(line)


def test_nothing_stays_behind_a_finished_job(unbroken: Path) -> None:
    assert launcher.processes_of(unbroken) == []
    ray_temp_dir = json.loads((unbroken / "supervisor.json").read_text())["ray_temp_dir"]
    assert not Path(ray_temp_dir).exists()


def test_a_spare_takes_a_killed_workers_place_and_no_step_is_repeated(tmp_path: Path) -> None:
    job = launcher.write_job(tmp_path, training={"steps": 100_000}, checkpoint={"every": 0})
    run_dir = tmp_path / "run"
    arguments = ("--workers", 4, "--set", "pipeline.placement=mirror", "--spares", 1)
    launched = launcher.run("launch", job, *arguments, "--run-dir", run_dir, "--detach")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    content = launcher.wait_for_file(
        run_dir, lambda content: content.get("warm_spares") == 1 and content["step"] >= 2
    )
    pids = [worker["pid"] for worker in content["workers"]]
    os.kill(pids[2], signal.SIGKILL)
    killed_at = content["step"]
    content = launcher.wait_for_file(
        run_dir,
        lambda content: content["generation"] == 2 and content["step"] >= killed_at + 5,
    )
    after = [worker["pid"] for worker in content["workers"]]
    assert [before == now for before, now in zip(pids, after, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    # The next spare is on its way.
    launcher.wait_for_file(run_dir, lambda content: content["warm_spares"] == 1)
    assert launcher.run("stop", run_dir).returncode == 0
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last_step = len(steps)
    assert [line["step"] for line in steps] == [*range(1, last_step + 1)]
    events = [*map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())]
    formed = [event for event in events if event["kind"] == "generation"]
    assert (formed[1]["source"], formed[1]["kept"]) == ("copies", [0, 1, 3])
    alone = load_job(run_dir / "job.yaml")
    losses = losses_of(alone, make_plan(alone), run_dir=tmp_path, last_step=last_step)
    assert [line["loss"] for line in steps] == losses
    assert launcher.processes_of(run_dir) == []


def test_an_interrupted_job_resumes_on_fewer_workers_with_the_losses_of_an_unbroken_run(
    unbroken: Path, tmp_path: Path
) -> None:
    job = launcher.write_job(
        tmp_path,
        training={"steps": 10_000},
        checkpoint={"every": 0},
        worker={"device": "emulated"},  # so slow that it is interrupted in its first steps
        emulation={"forward_ms": 10, "input_ms": 10, "weight_ms": 5},
    )
    run_dir = tmp_path / "run"
    process = launcher.start("launch", job, "--workers", 3, "--run-dir", run_dir)
    launcher.wait_for_file(run_dir, lambda content: content["step"] >= 2)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=launcher.TIMEOUT_S)
    assert process.returncode == 130, output
    content = launcher.status(run_dir)
    assert content["state"] == "stopped"
    assert content["checkpoint_step"] == content["step"]
    assert content["supervisor_alive"] is False
    assert launcher.processes_of(run_dir) == []

    last_step = max(8, content["step"] + 1)
    resumed = launcher.run("resume", run_dir, "--workers", 2, "--steps", last_step)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    losses = launcher.losses(run_dir)
    assert list(losses) == [*range(1, last_step + 1)]
    assert {step: losses[step] for step in range(1, 9)} == launcher.losses(unbroken)
    assert launcher.status(run_dir)["job_id"] == content["job_id"]


def test_a_model_that_raises_fails_the_job_and_names_the_culprit(tmp_path: Path) -> None:
    job = launcher.write_job(
        tmp_path, faults={"inject": [{"raise": {"rank": 1, "step": 2, "op": "F"}}]}
    )
    run_dir = tmp_path / "run"
    result = launcher.run("launch", job, "--workers", 2, "--run-dir", run_dir)
    assert result.returncode == 5, result.stdout + result.stderr
    assert "rank 1" in result.stderr
    assert "fault script raised" in result.stderr
    culprit = launcher.status(run_dir)["error"]["culprit"]
    assert (culprit["rank"], culprit["step"]) == (1, 2)
    assert "TrainingError" in culprit["traceback"]
    assert launcher.processes_of(run_dir) == []
