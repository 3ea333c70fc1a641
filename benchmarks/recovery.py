"""Seconds from a fault to the next step that was not done before, by kind of fault and source of state.

deepopt against trainings of the same model that start their workers again: `torchrun --max-restarts` with
torch.distributed.pipelining and a file a rank, with FSDP2 and torch's distributed checkpoints, and Ray
Train. In turns, several faults a run. deepopt writes a checkpoint every ten steps; the peers write one after
each, so that a fault costs them no step but the one in work, or as `--peers-every` says. Losses are
compared with those of an undisturbed run. A lost host is a network, process and mount namespace that is
switched off (two of them, Ray over ssh; takes root); each such run has one fault.

What torch's peers do when a rank hangs is not measured: gloo's timeout, after which it would be noticed, is
30 minutes by default. Ray Train is a peer where `ray.train` can be imported; `make bench` sees to that.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _contenders import pipelining, ray_train, sharded
from _host_faults import host_fault, why_no_hosts
from _machine import describe
from _processes import StartedCommand, end_cleanly_on_signals, started
from _recovery_cases import (
    FSDP,
    PIPELINING,
    RAY_TRAIN,
    Case,
    Fault,
    chosen,
    compare,
    report,
)
from _report import progress, say

from deepopt.config import JobConfig
from deepopt.convert import describe as describe_model
from deepopt.job_file import dump_job, load_job
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.planner.decide import make_plan
from deepopt.worker.rehearsal import RankPlan

LOOK_EVERY_S = 0.01
WORKERS = 2  # of each side; a mirror of two holds every stage twice
CHECKPOINT_EVERY = 10
STEPS_COMPARED = 30
SETTLED_STEPS = 8  # of a peer, between its restart and the next fault


def main() -> None:
    """Do faults to all contenders in turns and print the times and the ratio."""
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
    say(f"measured: {options.rounds} run(s) each in turns, {options.faults} fault(s) a run")
    say(
        f"written:  a checkpoint every {CHECKPOINT_EVERY} steps, peers every {options.peers_every}\n"
    )
    found: dict[Case, list[Fault]] = {case: [] for case in chosen(options.only)}
    found, notes = _that_can_run(found)
    losses: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        for number in range(options.rounds):
            cases = list(found)
            for case in cases if number % 2 == 0 else reversed(cases):
                progress(f"round {number + 1}: {case.name}")
                out = Path(folder) / f"{number}-{cases.index(case)}"
                if case.peer:
                    found[case] += _peer_run(job_file, out, case, options)
                elif case.kind == "host":
                    found[case] += _host_runs(job_file, out, case, options)
                else:
                    faults, said = _our_run(job_file, out, case, options)
                    found[case] += faults
                    losses |= said
        if losses:
            _check_losses(job, losses)
    say(report(found))
    say("\n".join(notes))
    if losses:
        count = min(len(losses), STEPS_COMPARED)
        say(f"losses of the first {count} steps: bit-equal to an undisturbed run")
    if told := compare(found):
        say(f"\n{told}")


def _that_can_run(
    found: dict[Case, list[Fault]],
) -> tuple[dict[Case, list[Fault]], list[str]]:
    """The cases that can run here, and why others cannot."""
    reasons: dict[str, str | None] = {}
    if any(case.kind == "host" for case in found):
        reasons["host"] = why_no_hosts()
    if any(case.peer == RAY_TRAIN for case in found):
        reasons[RAY_TRAIN] = _why_no_ray_train()
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    notes = [f"{name}: not run: {reason}" for name, reason in missing.items()]
    able = {c: f for c, f in found.items() if c.kind not in missing and c.peer not in missing}
    return able, notes


def _why_no_ray_train() -> str | None:
    try:
        import ray.train.torch as _  # noqa: F401
    except ImportError as error:
        return str(error).splitlines()[0]
    return None


def _our_run(
    job_file: Path, run_dir: Path, case: Case, options: argparse.Namespace
) -> tuple[list[Fault], dict[int, float]]:
    sets = [word for setting in case.settings for word in ("--set", setting)]
    command = [str(Path(sys.executable).parent / "deepopt"), "launch", str(job_file), "--json"]
    command += ["--workers", str(WORKERS), "--run-dir", str(run_dir), *sets]
    metrics = StepLines(run_dir / "metrics.jsonl")
    faults = []
    with started(command, log=run_dir.with_suffix(".log")) as running:
        for number in range(options.faults):
            seen = len(metrics.look())
            status = _await(
                lambda seen=seen: (
                    len(metrics.look()) >= seen + CHECKPOINT_EVERY + 5
                    and _ready(run_dir, spares=case.spares)
                ),
                running,
                options,
            )
            rank = number % WORKERS
            pid = next(w["pid"] for w in status["workers"] if w["rank"] == rank)
            fault = _strike(pid, case.kind, metrics, "generation", running, options)
            closed = _await(lambda number=number: _fault(run_dir, number), running, options)
            faults.append(replace(fault, phases_s=closed["times_s"]))
        said = {line["step"]: line["loss"] for line in metrics.look()}
    return faults, said


def _host_runs(
    job_file: Path, out: Path, case: Case, options: argparse.Namespace
) -> list[Fault]:
    """Runs on two hosts, the second of which is switched off once."""
    found = []
    for number in range(options.faults):
        lost = host_fault(
            job_file,
            out.with_name(f"{out.name}-{number}"),
            settings=case.settings,
            timeout_s=options.timeout_s,
        )
        progress(f"  {lost['back_s']:.2f} s")
        found.append(Fault(back_s=lost["back_s"], repeated=0, phases_s=lost["times_s"]))
    return found


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


def _peer_run(
    job_file: Path, out: Path, case: Case, options: argparse.Namespace
) -> list[Fault]:
    checkpoints = out.with_suffix(".checkpoints")
    checkpoints.mkdir()
    command = _peer_command(job_file, out, case.peer)
    command += ["--checkpoints", str(checkpoints), "--every", str(options.peers_every)]
    faults, steps = [], StepLines(out)
    with started(command, log=out.with_suffix(".log")) as running:
        for number in range(options.faults):
            enough = len(steps.look()) + SETTLED_STEPS
            _await(lambda enough=enough: len(steps.look()) >= enough, running, options)
            pid = _peer_pid(out, case.peer, rank=number % WORKERS)
            faults.append(_strike(pid, "death", steps, "restart", running, options))
    return faults


def _peer_command(job_file: Path, out: Path, peer: str) -> list[str]:
    if peer == RAY_TRAIN:
        return list(ray_train(job_file, workers=WORKERS).arguments(out))
    if peer == PIPELINING:
        contender = pipelining(job_file, workers=WORKERS, schedule="1f1b")
    else:
        assert peer == FSDP, peer
        contender = sharded(job_file, workers=WORKERS)
    command = list(contender.arguments(out))
    command[2:2] = ["--max-restarts", "1000"]
    return command


def _peer_pid(out: Path, peer: str, *, rank: int) -> int:
    """The process of a rank, or of torchrun's as many-th by pid."""
    if peer == RAY_TRAIN:
        return int(out.with_suffix(f".rank{rank}").read_text())
    return sorted(_ranks(str(out)))[rank]


def _ranks(mark: str) -> list[int]:
    """Processes of torchrun's ranks: Python on the script, but not torchrun itself."""
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


def _strike(
    pid: int,
    kind: str,
    steps: StepLines,
    group: str,
    running: StartedCommand,
    options: argparse.Namespace,
) -> Fault:
    """Send a signal and wait for the first new step of the group that comes after."""
    before = list(steps.look())
    os.kill(pid, signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
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
    usual_s = statistics.median(line["step_time_s"] for line in before[-CHECKPOINT_EVERY:])
    return Fault(back_s=back_s, repeated=repeated, phases_s={}, step_s=usual_s)


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
    parser.add_argument("--faults", type=int, help="faults a run [5, quick: 2]")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="contenders with this in their name; several times: more of them, in turns [all]",
    )
    parser.add_argument(
        "--peers-every", type=int, default=1, help="steps between checkpoints of the peers [1]"
    )
    parser.add_argument("--timeout-s", type=float, default=180.0, help="longest wait [180]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    try:
        chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    options.rounds = options.rounds or (1 if options.quick else 4)
    options.faults = options.faults or (2 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
