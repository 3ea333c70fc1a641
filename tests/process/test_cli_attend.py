"""The command line stays with a job, passes Ctrl-C on, and says how it ended.

In a process of its own and with a fake supervisor: signals and terminals are real, training is not.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deepopt.config import JobConfig
from deepopt.job_file import dump_job
from support import fake_supervisor

TESTS = Path(__file__).parents[1]

DRIVER = """
import json, sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from support.fake_supervisor import FakeSupervisors
from deepopt.config import JobConfig
from deepopt.run_directory import RunDirectory
from deepopt.launch import follow
from deepopt_cli import attend
run_dir, scenario, options = Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
follow.KILL_GRACE_S = options.get("kill_grace_s", follow.KILL_GRACE_S)
supervisors = FakeSupervisors()
module = types.ModuleType("deepopt.head.supervisor")
module.spawn_supervisor = lambda path, **_: supervisors.spawn(path, **scenario)
sys.modules["deepopt.head.supervisor"] = module
code = attend.attend(
    RunDirectory(run_dir),
    job=JobConfig(name="tiny"),
    shown_as=Path("runs/tiny"),
    json=options.get("json", False),
    fresh=False,
)
sys.exit(code)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "job.yaml").write_text(dump_job(JobConfig(name="tiny")))
    return run_dir


def command(run_dir: Path, scenario: dict[str, Any], **options: Any) -> list[str]:
    parts = [str(TESTS), str(run_dir), json.dumps(scenario), json.dumps(options)]
    return [sys.executable, "-c", DRIVER, *parts]


def attend(
    run_dir: Path, scenario: dict[str, Any], **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(run_dir, scenario, **options),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def attend_and_interrupt(
    run_dir: Path, scenario: dict[str, Any], *, until: list[Path], **options: Any
) -> tuple[int, str, str]:
    """Send a SIGINT whenever the next of some files is there."""
    process = subprocess.Popen(
        command(run_dir, scenario, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for path in until:
            fake_supervisor.wait_for(path)
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


def supervisor_pid(run_dir: Path) -> int:
    return int(json.loads((run_dir / "supervisor.json").read_text())["pid"])


def test_a_job_is_shown_line_by_line_to_its_end(run_dir: Path) -> None:
    report = {"measured_step_s": 0.2, "simulated_step_s": 0.21}
    ended = attend(run_dir, {"steps": 3, "report": report, "teardown_s": 0.2})
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "10:11:12 running" in lines
    assert "finished at step 3 of 3, loss 4.2500" in lines
    # Written after the job had ended, while the supervisor was tidying up.
    assert "  step time   measured 200.0 ms, simulated 210.0 ms (+5.0 %)" in lines


def test_json_is_the_metrics_and_then_the_status(run_dir: Path) -> None:
    ended = attend(run_dir, {"steps": 3}, json=True)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines[:3] == [fake_supervisor.metrics(step) for step in (1, 2, 3)]
    [status] = lines[3:]
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 3, 0)
    assert status["run_dir"] == str(run_dir)
    assert ended.stderr == ""


def test_what_an_earlier_launch_left_behind_is_not_shown_again(run_dir: Path) -> None:
    attend(run_dir, {"steps": 2})
    ended = attend(run_dir, {"start_step": 2, "steps": 4}, json=True)
    steps = [json.loads(line)["step"] for line in ended.stdout.splitlines()]
    assert steps == [3, 4, 4]


def test_a_failed_job_shows_its_culprit_and_has_its_exit_code(run_dir: Path) -> None:
    culprit = {
        "rank": 1,
        "host": "host-a",
        "pid": 7,
        "step": 2,
        "action": "1B3",
        "message": "RuntimeError: boom",
        "traceback": "Traceback of rank 1",
    }
    victims = [{"rank": 0, "message": "peer 1 is gone"}]
    error = {
        "message": "rank 1 failed",
        "remedy": "fix it",
        "culprit": culprit,
        "victims": victims,
    }
    ended = attend(run_dir, {"steps": 2, "end": "failed", "exit_code": 5, "error": error})
    assert ended.returncode == 5
    parts = ended.stderr.split("\n\n")
    assert parts[0] == "error: rank 1 failed"
    assert "step 2, stage 1, op B, micro-batch 3" in parts[1]
    assert parts[2] == "Traceback of rank 1"
    assert parts[3] == "1 victim followed (rank 0): peer 1 is gone"
    assert parts[4] == "hint: fix it\n"


def test_a_supervisor_that_vanishes_is_a_cluster_error_with_its_last_words(
    run_dir: Path,
) -> None:
    ended = attend(
        run_dir, {"steps": 2, "end": "vanish", "log": "first\nno space left on device\n"}
    )
    assert ended.returncode == 3
    assert "is gone; the job was running at step 2" in ended.stderr
    assert "no space left on device" in ended.stderr
    assert "hint: deepopt resume runs/tiny goes on from the newest checkpoint" in ended.stderr


def test_the_first_interrupt_stops_with_a_checkpoint(run_dir: Path) -> None:
    code, out, err = attend_and_interrupt(
        run_dir, {"steps": 10_000}, until=[run_dir / "metrics.jsonl"]
    )
    assert code == 130, err
    assert json.loads((run_dir / "seen.jsonl").read_text()) == {
        "kind": "stop",
        "checkpoint": True,
    }
    assert "stopping after this step, with a checkpoint" in err
    assert "stopped at step" in out
    assert "deepopt resume runs/tiny" in out


def test_the_second_interrupt_kills(run_dir: Path) -> None:
    code, _, err = attend_and_interrupt(
        run_dir,
        {"steps": 10_000, "heeds_stop": False},
        until=[run_dir / "metrics.jsonl", run_dir / "seen.jsonl"],
    )
    assert code == 130, err
    seen = [
        json.loads(line)["kind"] for line in (run_dir / "seen.jsonl").read_text().splitlines()
    ]
    assert seen == ["stop", "kill"]
    assert not fake_supervisor.lives(supervisor_pid(run_dir))


def test_a_supervisor_that_does_not_even_heed_kill_is_killed_with_all_below_it(
    run_dir: Path,
) -> None:
    code, _, err = attend_and_interrupt(
        run_dir,
        {"steps": 10_000, "heeds_stop": False, "heeds_kill": False, "child": True},
        until=[run_dir / "metrics.jsonl", run_dir / "seen.jsonl"],
        kill_grace_s=0.2,
    )
    assert code == 130
    assert "the supervisor did not end within 0.2 s: SIGKILL" in err
    assert "go on from the last checkpoint with: deepopt resume runs/tiny" in err
    assert not fake_supervisor.lives(supervisor_pid(run_dir))
    child = int((run_dir / "child.pid").read_text())
    deadline_s = time.monotonic() + 60
    while fake_supervisor.lives(child):
        assert time.monotonic() < deadline_s, f"child {child} of the supervisor still runs"
        time.sleep(0.02)


def test_a_closed_pipe_does_not_end_the_job(run_dir: Path) -> None:
    process = subprocess.Popen(
        command(run_dir, {"steps": 40}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "the job goes on: deepopt status runs/tiny" in err
    deadline_s = time.monotonic() + 60
    while json.loads((run_dir / "status.json").read_text())["state"] != "finished":
        assert time.monotonic() < deadline_s, "the job did not go on"
        time.sleep(0.05)


def test_a_terminal_gets_a_live_view(run_dir: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(run_dir, {"steps": 20}),
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "\x1b[" in text
    assert "step 20/20" in text
    assert "host-a" in text
    assert "finished at step 20 of 20" in text
