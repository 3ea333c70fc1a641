"""Seconds from a fault to the next step that was not done before, by kind of fault and source of state.

deepopt against `torchrun --max-restarts` of the same model: torch.distributed.pipelining with a file a rank,
and FSDP2 with torch's distributed checkpoints, a checkpoint every ten steps. In turns, several faults a run.
Losses are compared with those of an undisturbed run. A lost host is a network, process and mount namespace
that is switched off (two of them, Ray over ssh; takes root); each such run has one fault.

What torch's peers do when a rank hangs is not measured: gloo's timeout, after which it would be noticed, is
30 minutes by default. Ray Train is a peer where `ray.train` can be imported.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _contenders import pipelining, sharded
from _host_faults import host_fault, why_no_hosts
from _machine import describe
from _processes import StartedCommand, end_cleanly_on_signals, started
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.convert import describe as describe_model
from deepopt.job_file import dump_job, load_job
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.planner.decide import make_plan
from deepopt.worker.rehearsal import RankPlan

LOOK_EVERY_S = 0.01
AIM = 10.0
WORKERS = 2  # of each side; a mirror of two holds every stage twice
CHECKPOINT_EVERY = 10
STEPS_COMPARED = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A contender and what is done to it.

    Args:
        kind: `death` (SIGKILL), `hang` (SIGSTOP) or `host`.
        source: where a new worker's state comes from, and who takes the place.
        settings: of deepopt's job; empty for a peer.
        peer: name of a peer; empty for deepopt.
        aim_s: what 95 of 100 faults shall stay below; None: nothing is wanted.
    """

    kind: str
    source: str
    settings: tuple[str, ...] = ()
    peer: str = ""
    aim_s: float | None = None

    @property
    def name(self) -> str:
        """For people and `--only`."""
        return f"{self.kind}: {self.peer or 'deepopt'}, {self.source}"

    @property
    def spares(self) -> int:
        """Processes that wait."""
        return int("faults.spares=1" in self.settings)


MIRROR, V, LINE = (f"pipeline.placement={kind}" for kind in ("mirror", "v", "line"))
SPARE, NO_COPIES = "faults.spares=1", "faults.replicas=none"
OURS = Case(kind="death", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=2.0)
PIPELINING, FSDP = "torchrun pipelining", "torchrun FSDP2 + DCP"
CASES = (
    OURS,
    Case(kind="death", source="mirror, new process", settings=(MIRROR,)),
    Case(kind="death", source="peer's memory, spare", settings=(V, SPARE), aim_s=2.0),
    Case(kind="death", source="disk, new process", settings=(LINE, NO_COPIES)),
    Case(kind="hang", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=3.5),
    Case(kind="hang", source="peer's memory, spare", settings=(V, SPARE), aim_s=3.5),
    Case(kind="host", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=5.0),
    Case(kind="death", source="disk", peer=PIPELINING),
    Case(kind="death", source="disk", peer=FSDP),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one fault cost.

    Args:
        back_s: from the fault to the next step that was not done before.
        repeated: steps that were done twice.
        phases_s: seconds by part, as deepopt's head saw them; empty for a peer.
    """

    back_s: float
    repeated: int
    phases_s: dict[str, float]


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
    say(f"measured: {options.rounds} run(s) each in turns, {options.faults} fault(s) a run\n")
    found: dict[Case, list[Fault]] = {case: [] for case in chosen(options.only)}
    found, notes = _without_hosts(found)
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
    _tell(found, notes, losses)
    _tell_ratio(found)


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases to measure, in their order.

    Args:
        names: each a part of the names of those wanted; none: all of them.

    Raises:
        ValueError: a name is in no case's.
    """
    for name in names:
        if not any(name in case.name for case in CASES):
            known = ", ".join(f'"{case.name}"' for case in CASES)
            raise ValueError(f'--only "{name}" is in none of {known}')
    return [case for case in CASES if not names or any(name in case.name for name in names)]


def _without_hosts(
    found: dict[Case, list[Fault]],
) -> tuple[dict[Case, list[Fault]], list[str]]:
    """The cases that can run here, and why others cannot."""
    notes = [f"Ray Train: not run: {_why_no_ray_train()}"]
    missing = why_no_hosts() if any(case.kind == "host" for case in found) else None
    if missing is not None:
        notes.append(f"host: not run: {missing}")
        found = {case: faults for case, faults in found.items() if case.kind != "host"}
    return found, notes


def _why_no_ray_train() -> str:
    try:
        import ray.train.torch as _  # noqa: F401
    except ImportError as error:
        return str(error).splitlines()[0]
    return "no peer of this benchmark uses it yet"


def _tell(
    found: dict[Case, list[Fault]], notes: Sequence[str], losses: dict[int, float]
) -> None:
    header = ("", "faults", "p50 s", "p95 s", "worst s", "aim of p95", "steps repeated")
    say(table(header, [_row(case, faults) for case, faults in found.items() if faults]))
    for case, faults in found.items():
        parts = [part for part in (faults[0].phases_s if faults else ()) if part != "total"]
        medians = {p: statistics.median(f.phases_s.get(p, 0.0) for f in faults) for p in parts}
        if medians:
            say(f"{case.name}: " + ", ".join(f"{p} {s:.2f} s" for p, s in medians.items()))
    say("\n".join(notes))
    if losses:
        count = min(len(losses), STEPS_COMPARED)
        say(f"losses of the first {count} steps: bit-equal to an undisturbed run")


def _tell_ratio(found: dict[Case, list[Fault]]) -> None:
    """The slowest thing that counts: against the faster of the peers."""
    peers = [
        statistics.median(fault.back_s for fault in faults)
        for case, faults in found.items()
        if case.peer and faults
    ]
    if peers and found.get(OURS):
        ours = statistics.median(fault.back_s for fault in found[OURS])
        say(f"\nmedians: {OURS.name} {ours:.2f} s, the faster peer {min(peers):.2f} s\n")
        say(ratio_line(min(peers) / ours, aim=AIM))


def _row(case: Case, faults: Sequence[Fault]) -> tuple[str, ...]:
    times = sorted(fault.back_s for fault in faults)
    p95_s = times[min(len(times) - 1, int(0.95 * len(times)))]
    return (
        case.name,
        str(len(times)),
        f"{statistics.median(times):.2f}",
        f"{p95_s:.2f}",
        f"{times[-1]:.2f}",
        "" if case.aim_s is None else f"{case.aim_s:g}",
        f"{statistics.mean(fault.repeated for fault in faults):.1f}",
    )


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
    if case.peer == PIPELINING:
        contender = pipelining(job_file, workers=WORKERS, schedule="1f1b")
    else:
        contender = sharded(job_file, workers=WORKERS)
    command = list(contender.arguments(out))
    command[2:2] = ["--max-restarts", "1000"]
    command += ["--checkpoints", str(checkpoints), "--every", str(CHECKPOINT_EVERY)]
    faults, steps = [], StepLines(out)
    with started(command, log=out.with_suffix(".log")) as running:
        for number in range(options.faults):
            enough = len(steps.look()) + CHECKPOINT_EVERY + 5
            _await(lambda enough=enough: len(steps.look()) >= enough, running, options)
            pids = sorted(_ranks(str(out)))
            faults.append(
                _strike(pids[number % WORKERS], "death", steps, "restart", running, options)
            )
    return faults


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
    return Fault(back_s=back_s, repeated=repeated, phases_s={})


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
