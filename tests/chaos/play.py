"""One real job that faults are done to: launched as users do, watched by its files, hit by signals."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepopt.cluster.process_table import descendants
from support import launcher

STEP_TIMEOUT_S = 90.0  # for what a healthy job does within seconds
LOOK_S = 0.02
SETTLE_S = 60.0  # for further reports of what was done at once

# Two workers that hold each stage twice; a step takes a quarter of a second.
JOB: dict[str, Any] = {
    "worker": {"device": "emulated"},
    "emulation": {"forward_ms": 6, "input_ms": 6, "weight_ms": 3},
    "pipeline": {"placement": "mirror", "schedule": "bi_stream"},
    "checkpoint": {"every": 10},
    "faults": {"max_restarts": 1000, "max_head_restarts": 1000, "max_host_losses": 1000},
}


class NotSeen(Exception):
    """What should have happened did not; the message says what."""


class Play:
    """A job from its launch to its end.

    Args:
        folder: new folder for the job file and the run directory.
        steps: of the job.
        workers: of the job.
        sections: of the job file, over `JOB`, section by section.
    """

    def __init__(self, folder: Path, *, steps: int, workers: int = 2, **sections: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.run_dir = folder / "run"
        self.steps = steps
        self.workers = workers
        merged = {
            name: {**JOB.get(name, {}), **sections.get(name, {})}
            for name in JOB.keys() | sections.keys()
        }
        self.job = launcher.write_job(
            folder, **{**merged, "training": {"steps": steps, **merged.get("training", {})}}
        )
        self.shared_memory: set[str] = set()
        self._told = 0  # number of the last report that was returned

    def launch(self) -> None:
        """Start it and leave it running."""
        self._command("launch", self.job, "--workers", self.workers, "--run-dir", self.run_dir)

    def resume(self, *options: object) -> None:
        """Go on with it after its end."""
        self._command("resume", self.run_dir, *options)

    def close(self) -> None:
        """End it, whatever it does."""
        if (self.run_dir / "supervisor.json").exists():
            launcher.run("stop", self.run_dir, "--kill", timeout_s=STEP_TIMEOUT_S)

    def close_cleanly(self) -> None:
        """Stop it after the step in work, with a checkpoint."""
        launcher.run("stop", self.run_dir, timeout_s=STEP_TIMEOUT_S)
        self.until("its stop", lambda s: s["state"] == "stopped")

    def _command(self, *words: object) -> None:
        done = launcher.run(*words, "--detach", timeout_s=STEP_TIMEOUT_S)
        if done.returncode != 0:
            raise NotSeen(f"deepopt {words[0]} ended with {done.returncode}: {done.stderr}")

    # --- looking --------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`; empty before there is one."""
        path = self.run_dir / "status.json"
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    def until(
        self,
        what: str,
        condition: Callable[[dict[str, Any]], object],
        *,
        timeout_s: float = STEP_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Wait for a status.

        Raises:
            NotSeen: it did not come, or the job has failed meanwhile.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            status = self.status
            if status and condition(status):
                return status
            if status.get("state") == "failed":
                raise NotSeen(f"{what}: the job failed: {status['error']['message']}")
            if time.monotonic() > until_s:
                raise NotSeen(f"{what}: not after {timeout_s:g} s; {status.get('state')}")
            time.sleep(LOOK_S)

    def steady(self, *, steps: int = 8, spares: int = 0) -> dict[str, Any]:
        """The status after some more undisturbed steps, with the spares warm."""
        now = self.until("running", lambda s: s["state"] == "running")["step"]
        return self.until(
            f"{steps} more steps",
            lambda s: (
                s["state"] == "running"
                and s["step"] >= now + steps
                and s.get("warm_spares", 0) >= spares
            ),
        )

    def next_faults(self, count: int = 1) -> list[dict[str, Any]]:
        """The reports after those that this has returned before, when they are over.

        Args:
            count: how many there should be; where there are fewer a moment later, those.
        """

        def over(status: dict[str, Any]) -> list[dict[str, Any]]:
            wanted = range(self._told + 1, self._told + 1 + count)
            new = [fault for fault in status["faults"] if fault["number"] in wanted]
            return [fault for fault in new if fault["outcome"] != "open"]

        status = self.until("a recovery", over)
        until_s = time.monotonic() + SETTLE_S
        while len(over(status)) < count and time.monotonic() < until_s:
            time.sleep(LOOK_S)
            status = self.status
        faults = over(status)
        self._told = faults[-1]["number"]
        return faults

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def losses(self) -> list[tuple[int, float]]:
        """(step, loss) of every line, repeated steps as often as they were reported."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line["step"], line["loss"]) for line in map(json.loads, lines)]

    # --- processes ------------------------------------------------------------------------

    def supervisor(self) -> int:
        """Process id of the supervisor."""
        return int(json.loads((self.run_dir / "supervisor.json").read_text())["pid"])

    def actors(self, kind: str) -> list[int]:
        """Process ids of Ray's actors of a class, on this machine."""
        found = []
        for process in descendants(self.supervisor()):
            try:
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if kind.encode() in command:
                found.append(process.pid)
        return found

    def actor(self, kind: str) -> int:
        """The one actor of a class, when it is there."""
        until_s = time.monotonic() + STEP_TIMEOUT_S
        while len(found := self.actors(kind)) != 1:
            if time.monotonic() > until_s:
                raise NotSeen(f"{len(found)} processes of {kind}")
            time.sleep(LOOK_S)
        return found[0]

    def worker(self, rank: int) -> int:
        """Process id of a worker that runs now."""
        status = self.until("running", lambda s: s["state"] == "running")
        return int(status["workers"][rank]["pid"])

    def note_shared_memory(self) -> None:
        """Remember which files in /dev/shm the job's processes have mapped."""
        for process in descendants(self.supervisor()):
            try:
                maps = Path(f"/proc/{process.pid}/maps").read_text()
            except OSError:
                continue
            self.shared_memory |= {
                line.split()[5] for line in maps.splitlines() if " /dev/shm/" in line
            }

    def leftovers(self) -> list[str]:
        """What is still there after the end: processes, Ray's folder, shared memory."""
        until_s = time.monotonic() + STEP_TIMEOUT_S
        while launcher.processes_of(self.run_dir) and time.monotonic() < until_s:
            time.sleep(LOOK_S)
        left = launcher.processes_of(self.run_dir)
        folder = json.loads((self.run_dir / "supervisor.json").read_text())["ray_temp_dir"]
        paths = [folder] if folder else []
        return left + [path for path in (*paths, *self.shared_memory) if Path(path).exists()]


def strike(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal."""
    os.kill(pid, number)


def wrong_losses(
    lines: Sequence[tuple[int, float]], reference: dict[int, float]
) -> list[tuple[int, float]]:
    """The lines that are not what an undisturbed run says, bit for bit."""
    return [(step, loss) for step, loss in lines if loss != reference[step]]
