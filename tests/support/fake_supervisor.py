"""A supervisor and head that only write the files of a run directory, as a scenario tells them.

Run as a script: `fake_supervisor.py RUN_DIR SCENARIO_JSON`. Standard library only, so that it
starts at once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "steps": 5,  # the job's last step
    "start_step": 0,
    "step_s": 0.02,
    "end": "finished",  # finished, failed, vanish: what happens after the last step
    "exit_code": 0,
    "error": None,
    "heeds_stop": True,
    "heeds_kill": True,
    "teardown_s": 0.0,
    "report": None,
    "stillborn": False,  # ends before it has written anything
    "child": False,  # starts a process that would outlive it
    "log": "",
}


class FakeSupervisors:
    """Starts fake supervisors, each in a session of its own, and ends those that are left."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, run_dir: Path, **scenario: Any) -> int:
        """Start one; the pid. What differs from `DEFAULTS` is given by name."""
        step = scenario.get("start_step", 0)
        starting = status(state="starting", step=step, workers=[], supervisor_pid=0)
        write(run_dir / "status.json", starting)
        command = [sys.executable, "-S", __file__, str(run_dir), json.dumps(scenario)]
        self._processes.append(subprocess.Popen(command, start_new_session=True))
        return self._processes[-1].pid

    def close(self) -> None:
        """Kill and reap."""
        for process in self._processes:
            process.kill()
            process.wait()


def wait_for(path: Path, *, timeout_s: float = 60.0) -> None:
    """Wait until a file is there."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} did not come within {timeout_s} s"
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def worker(rank: int, *, stages: list[int], step: int = 3) -> dict[str, Any]:
    """An entry of `workers`."""
    return {
        "rank": rank,
        "pid": 4000 + rank,
        "host": "host-a",
        "stages": stages,
        "device": "cpu",
        "heartbeat_age_s": 0.25,
        "step": step,
        "action": "1F2",
        "state": "running",
    }


def status(**changes: Any) -> dict[str, Any]:
    """A whole `status.json`."""
    return {
        "job_id": "0123abcd",
        "name": "tiny",
        "state": "running",
        "step": 3,
        "last_step": 5,
        "generation": 1,
        "plan_id": 1,
        "exit_code": None,
        "error": None,
        "workers": [worker(0, stages=[0, 1]), worker(1, stages=[0, 1])],
        "loss": 4.25,
        "tokens_per_s": 12345.6,
        "tokens_per_s_per_worker": 6172.8,
        "mfu": 0.123,
        "eta_s": 12.0,
        "stage_busy": {"0": 0.75, "1": 0.5},
        "bubble": 0.375,
        "restarts": 0,
        "checkpoint_step": 2,
        "placement": "mirror",
        "schedule": "bi_stream",
        "updated_at": datetime.now(tz=UTC).isoformat(timespec="milliseconds"),
        "supervisor_pid": os.getpid(),
        **changes,
    }


def metrics(step: int) -> dict[str, Any]:
    """A line of `metrics.jsonl`."""
    return {
        "step": step,
        "loss": 5.0 - step / 8,
        "grad_norm": 0.5,
        "learning_rate": 3e-3,
        "tokens": 4096,
        "step_time_s": 0.25,
        "tokens_per_s": 16384.0,
        "tokens_per_s_per_worker": 8192.0,
        "mfu": 0.125,
        "generation": 1,
        "bubble": 0.25,
        "compute_s": [0.125, 0.125],
        "wait_s": [0.125, 0.125],
        "time": "2026-01-01T00:00:00.000+00:00",
    }


def write(path: Path, content: object) -> None:
    """Replace a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(json.dumps(content))
    staged.replace(path)


def append(path: Path, content: object) -> None:
    """Append a JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(content) + "\n")


def write_supervisor(run_dir: Path, *, pid: int, start_time: int | None = None) -> None:
    """Write `supervisor.json` for a process."""
    if start_time is None:
        stat = Path(f"/proc/{pid}/stat").read_text()
        start_time = int(stat.rpartition(")")[2].split()[19])
    content = {"pid": pid, "start_time": start_time, "host": socket.gethostname()}
    write(run_dir / "supervisor.json", content)


def main(run_dir: Path, scenario: dict[str, Any]) -> None:
    """Play the scenario."""
    play = {**DEFAULTS, **scenario}
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "supervisor.log").write_text(play["log"])
    if play["stillborn"]:
        return
    write_supervisor(run_dir, pid=os.getpid())
    if play["child"]:
        sleep = [sys.executable, "-S", "-c", "import time; time.sleep(120)"]
        child = subprocess.Popen(sleep, start_new_session=True)
        (run_dir / "child.pid").write_text(str(child.pid))
    step, state, asked = play["start_step"], "running", None
    common = {"last_step": play["steps"]}
    append(
        run_dir / "events.jsonl",
        {"time": "2026-01-01T10:11:12", "kind": "state", "state": state},
    )
    while step < play["steps"]:
        step += 1
        time.sleep(play["step_s"])
        append(run_dir / "metrics.jsonl", metrics(step))
        write(run_dir / "status.json", status(step=step, state=state, **common))
        for path in sorted((run_dir / "requests").glob("*.json")):
            wanted = json.loads(path.read_text())
            append(run_dir / "seen.jsonl", wanted)
            path.unlink()
            if play[f"heeds_{wanted['kind']}"]:
                asked = wanted["kind"]
        if asked is not None:
            break
    if play["end"] == "vanish" and asked is None:
        return
    ending = {"state": play["end"], "exit_code": play["exit_code"], "error": play["error"]}
    if asked is not None:
        ending = {"state": "stopped", "exit_code": 130 if asked == "kill" else 0}
    write(run_dir / "status.json", status(step=step, **common, **ending))
    time.sleep(play["teardown_s"])
    if play["report"] is not None:
        write(run_dir / "report.json", play["report"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
