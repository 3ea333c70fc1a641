"""Seconds from `kill -9` of a worker to the next step that was not done before.

deepopt with a spare, with a new process, and from the disk (no second holder, no copies), against
`torchrun --max-restarts` of the same training with a checkpoint every ten steps. In turns, several
kills a run. Losses are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _contenders import pipelining
from _machine import describe
from _processes import StartedCommand, end_cleanly_on_signals, started
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.convert import describe as describe_model
from deepopt.job_file import dump_job, load_job
from deepopt.pipeline.transport import LoneTransport
from deepopt.planner.decide import make_plan
from deepopt.worker.rehearsal import RankPlan

LOOK_EVERY_S = 0.01
AIM = 10.0
WORKERS = 2  # of each side; a mirror of two holds every stage twice
CHECKPOINT_EVERY = 10
STEPS_COMPARED = 30
PEER, SPARE = "torchrun --max-restarts", "deepopt, mirror, spare"
OURS = {
    SPARE: ("pipeline.placement=mirror", "faults.spares=1"),
    "deepopt, mirror, new process": ("pipeline.placement=mirror",),
    "deepopt, V, copy in a peer's memory, spare": ("pipeline.placement=v", "faults.spares=1"),
    "deepopt, line, disk, new process": ("pipeline.placement=line", "faults.replicas=none"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What one kill cost.

    Args:
        back_s: from the signal to the next step that was not done before.
        repeated: steps that were done twice.
        phases_s: seconds by part, as deepopt's head saw them; empty for the peer.
    """

    back_s: float
    repeated: int
    phases_s: dict[str, float]


def main() -> None:
    """Kill workers of all contenders in turns and print the times and the ratio."""
    options = _parse()
    end_cleanly_on_signals()
    say("\n".join(describe()))
    job = load_job(
        None,
        [
            "model.kwargs={num_blocks: 6, tie_embeddings: false, d_model: 64, expert_hidden: 64}",
            "training.steps=100000",
            f"checkpoint.every={CHECKPOINT_EVERY}",
            "faults.max_restarts=1000",
            "logging.tensorboard=false",
            "logging.peak_flops=1e9",
        ],
    )
    say(f"job:      {WORKERS} workers, built-in model {job.model.kwargs}")
    say(f"measured: {options.rounds} run(s) each in turns, {options.kills} kill(s) a run\n")
    kills: dict[str, list[Kill]] = {name: [] for name in (*OURS, PEER) if options.only in name}
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        for number in range(options.rounds):
            names = list(kills)
            for name in names if number % 2 == 0 else reversed(names):
                progress(f"round {number + 1}: {name}")
                out = Path(folder) / f"{number}-{names.index(name)}"
                if name == PEER:
                    kills[name] += _peer_run(job_file, out, options)
                else:
                    found, said = _our_run(job_file, out, OURS[name], options)
                    kills[name] += found
                    losses |= said
        if losses:
            _check_losses(job, losses)
    say(
        table(
            ("", "median s", "worst s", "steps repeated"),
            [_row(n, k) for n, k in kills.items()],
        )
    )
    for name, found in kills.items():
        parts = [part for part in found[0].phases_s if part != "total"]
        medians = {p: statistics.median(k.phases_s.get(p, 0.0) for k in found) for p in parts}
        if medians:
            say(f"{name}: " + ", ".join(f"{p} {s:.2f} s" for p, s in medians.items()))
    if not {PEER, SPARE} <= kills.keys():
        return
    say(
        f"\nlosses of the first {min(len(losses), STEPS_COMPARED)} steps: bit-equal to an undisturbed run\n"
    )
    peer, ours = (statistics.median(k.back_s for k in kills[name]) for name in (PEER, SPARE))
    say(ratio_line(peer / ours, aim=AIM))


def _row(name: str, kills: list[Kill]) -> tuple[str, ...]:
    times = [kill.back_s for kill in kills]
    repeated = statistics.mean(kill.repeated for kill in kills)
    return (name, f"{statistics.median(times):.2f}", f"{max(times):.2f}", f"{repeated:.1f}")


def _our_run(
    job_file: Path, run_dir: Path, settings: tuple[str, ...], options: argparse.Namespace
) -> tuple[list[Kill], dict[int, float]]:
    sets = [word for setting in settings for word in ("--set", setting)]
    command = [str(Path(sys.executable).parent / "deepopt"), "launch", str(job_file), "--json"]
    command += ["--workers", str(WORKERS), "--run-dir", str(run_dir), *sets]
    spares = int("faults.spares=1" in settings)
    metrics = StepLines(run_dir / "metrics.jsonl")
    kills = []
    with started(command, log=run_dir.with_suffix(".log")) as running:
        for number in range(options.kills):
            seen = len(metrics.look())
            status = _await(
                lambda seen=seen: (
                    len(metrics.look()) >= seen + CHECKPOINT_EVERY + 5
                    and _ready(run_dir, spares=spares)
                ),
                running,
                options,
            )
            rank = number % WORKERS
            pid = next(w["pid"] for w in status["workers"] if w["rank"] == rank)
            kill = _kill(pid, metrics, "generation", running, options)
            closed = _await(lambda number=number: _fault(run_dir, number), running, options)
            kills.append(replace(kill, phases_s=closed["times_s"]))
        said = {line["step"]: line["loss"] for line in metrics.look()}
    return kills, said


def _ready(run_dir: Path, *, spares: int) -> dict[str, Any] | None:
    """The status, once there is a checkpoint and the spare waits."""
    status: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    settled = status["state"] == "running" and status["warm_spares"] >= spares
    return status if settled and status["checkpoint_step"] else None


def _fault(run_dir: Path, number: int) -> dict[str, Any] | None:
    """The report of a fault, once it is closed."""
    faults = json.loads((run_dir / "status.json").read_text())["faults"]
    over = [fault for fault in faults if "total" in fault["times_s"]]
    return next((fault for fault in over if fault["number"] == number + 1), None)


def _peer_run(job_file: Path, out: Path, options: argparse.Namespace) -> list[Kill]:
    checkpoints = out.with_suffix(".checkpoints")
    checkpoints.mkdir()
    command = list(pipelining(job_file, workers=WORKERS, schedule="1f1b").arguments(out))
    command[2:2] = ["--max-restarts", "1000"]
    command += ["--checkpoints", str(checkpoints), "--every", str(CHECKPOINT_EVERY)]
    kills, steps = [], StepLines(out)
    with started(command, log=out.with_suffix(".log")) as running:
        for number in range(options.kills):
            enough = len(steps.look()) + CHECKPOINT_EVERY + 5
            _await(lambda enough=enough: len(steps.look()) >= enough, running, options)
            pids = sorted(_ranks(str(out)))
            kills.append(_kill(pids[number % WORKERS], steps, "restart", running, options))
    return kills


def _ranks(mark: str) -> list[int]:
    """Processes of the peer's ranks: Python on the script, but not torchrun itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if mark in words and not any("torchrun" in word for word in words):
                found.append(int(entry.name))
    return found


def _kill(
    pid: int, steps: StepLines, group: str, running: StartedCommand, options: argparse.Namespace
) -> Kill:
    """Kill a process and wait for the first new step of the group that comes after."""
    before = list(steps.look())
    os.kill(pid, signal.SIGKILL)
    began_s = time.monotonic()
    number = before[-1][group]

    def is_back() -> list[dict[str, Any]] | None:
        lines = steps.look()
        done = max(line["step"] for line in lines if line[group] == number)
        return lines if any(x[group] > number and x["step"] > done for x in lines) else None

    lines = _await(is_back, running, options)
    back_s = time.monotonic() - began_s
    progress(f"  {back_s:.2f} s")
    all_steps = [line["step"] for line in lines[len(before) - 1 :]]
    repeated = len(all_steps) - len(set(all_steps))
    return Kill(back_s=back_s, repeated=repeated, phases_s={})


def _await(
    look: Callable[[], Any], running: StartedCommand, options: argparse.Namespace
) -> Any:
    deadline = time.monotonic() + options.timeout_s
    while not (found := look()):
        if running.check():
            raise RuntimeError("the training ended early")
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing after {options.timeout_s:.0f} s")
        time.sleep(LOOK_EVERY_S)
    return found


class StepLines:
    """The lines of a file that grows, read without reading anything twice.

    Args:
        path: JSON lines, one a step.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0
        self.lines: list[dict[str, Any]] = []

    def look(self) -> list[dict[str, Any]]:
        """All lines so far."""
        if self._path.exists() and self._path.stat().st_size > self._read_bytes:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read_bytes += len(whole + newline)
            self.lines += [json.loads(line) for line in whole.splitlines()]
        return self.lines


def _check_losses(job: JobConfig, losses: dict[int, float]) -> None:
    """Compare what was said with a run on one worker that nothing happens to, bit for bit."""
    torch.set_num_threads(job.worker.threads)  # part of the numbers
    plan = make_plan(job, describe_model(job), num_workers=1, plan_id=1).plan
    last_step = min(STEPS_COMPARED, max(losses))
    alone = RankPlan(0, LoneTransport(), job=job, plan=plan).run(last_step).losses
    for step, loss in enumerate(alone, start=1):
        if losses[step] != loss:
            raise ValueError(f"step {step}: loss {losses[step]}, undisturbed {loss}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, help="runs of each side [4, quick: 1]")
    parser.add_argument("--kills", type=int, help="kills a run [5, quick: 2]")
    parser.add_argument("--only", default="", help="contenders with this in their name [all]")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="longest wait [180]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 4)
    options.kills = options.kills or (2 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
