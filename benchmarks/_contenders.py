"""The programs that are compared, as commands: deepopt, torchrun, plain Python; and the options
of all benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from _report import say, table
from _time_slices import Contender, Measured, measure

from deepopt.config import JobConfig

_HERE = Path(__file__).parent
_BIN = Path(sys.executable).parent

# Paused workers send no heartbeats, and nobody shall take them for dead.
_PATIENCE = ("faults.heartbeat_timeout_s=3600", "faults.step_timeout_s=3600")


def deepopt(job: Path, *, workers: int, settings: Sequence[str] = ()) -> Contender:
    """`deepopt launch` of a job.

    Args:
        job: job file.
        workers: number of workers.
        settings: `KEY=VALUE` of `--set`.
    """
    options = [word for setting in (*settings, *_PATIENCE) for word in ("--set", setting)]
    return Contender(
        command=(
            *(str(_BIN / "deepopt"), "launch", str(job), "--json", "--workers", str(workers)),
            *("--steps", "{steps}", "--run-dir", "{out}", *options),
        ),
        steps_file="{out}/metrics.jsonl",
    )


def pipelining(job: Path, *, workers: int, schedule: str) -> Contender:
    """torchrun of torch.distributed.pipelining.

    Args:
        job: job file.
        workers: number of processes.
        schedule: see `_peer_pipelining.CUTS`.
    """
    return Contender(
        command=(
            *(str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", str(workers)),
            *(str(_HERE / "_peer_pipelining.py"), "--job", str(job), "--schedule", schedule),
            *("--steps", "{steps}", "--out", "{out}"),
        )
    )


def sharded(job: Path, *, workers: int) -> Contender:
    """torchrun of FSDP2; it also needs `--checkpoints`.

    Args:
        job: job file.
        workers: number of processes.
    """
    return Contender(
        command=(
            *(str(_BIN / "torchrun"), "--standalone", "--nproc-per-node", str(workers)),
            *(str(_HERE / "_peer_fsdp.py"), "--job", str(job)),
            *("--steps", "{steps}", "--out", "{out}"),
        )
    )


def ray_train(job: Path, *, workers: int) -> Contender:
    """Ray Train's `TorchTrainer`; it also needs `--checkpoints`.

    Args:
        job: job file.
        workers: number of processes.
    """
    return Contender(
        command=(
            *(sys.executable, str(_HERE / "_peer_ray_train.py"), "--job", str(job)),
            *("--workers", str(workers), "--steps", "{steps}", "--out", "{out}"),
        )
    )


def plain_loop(job: Path) -> Contender:
    """One Python process without any of deepopt's pipeline.

    Args:
        job: job file.
    """
    return Contender(
        command=(
            *(sys.executable, str(_HERE / "_peer_loop.py"), "--job", str(job)),
            *("--steps", "{steps}", "--out", "{out}"),
        )
    )


def parse_slices(
    description: str | None, *, parts: str = "", only: Sequence[str] = ()
) -> argparse.Namespace:
    """The options of benchmarks that measure in time slices.

    Args:
        description: of the benchmark; its first line is shown.
        parts: what `--parts` measures in addition; empty: there is no such option.
        only: what `--only` may name; empty: there is no such option.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--warm-up", type=int, default=3, help="first steps, not counted [3]")
    parser.add_argument("--cycles", type=int, help="slices of each contender [8, quick: 2]")
    parser.add_argument("--slice-s", type=float, help="length of a slice [4, quick: 1]")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="longest step [180]")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    if parts:
        parser.add_argument("--parts", action="store_true", help=f"measure {parts}")
    if only:
        parser.add_argument("--only", choices=only, help="one of them [all]")
    arguments = parser.parse_args()
    arguments.cycles = arguments.cycles or (2 if arguments.quick else 8)
    arguments.slice_s = arguments.slice_s or (1.0 if arguments.quick else 4.0)
    return arguments


def measure_slices(
    contenders: Mapping[str, Contender], *, job: JobConfig, options: argparse.Namespace
) -> dict[str, Measured]:
    """Measure contenders as the options say.

    Args:
        contenders: by name.
        job: gives the number of threads.
        options: from `parse_slices`.
    """
    return measure(
        contenders,
        warm_up=options.warm_up,
        cycles=options.cycles,
        slice_s=options.slice_s,
        threads=job.worker.threads,
        timeout_s=options.timeout_s,
    )


def say_job(job: JobConfig, *, workers: int, options: argparse.Namespace) -> None:
    """Say what is trained and how it is measured.

    Args:
        job: the job.
        workers: of each contender.
        options: from `parse_slices`.
    """
    training = job.training
    say(
        f"job:      {workers} worker(s) x {job.worker.threads} thread(s), built-in model "
        f"{job.model.kwargs}, {training.microbatches} micro-batches x {training.microbatch_size} x "
        f"{job.data.sequence_length} tokens, {job.precision.dtype}"
    )
    say(
        f"measured: {options.cycles} slices of {options.slice_s:g} s each, in turns, "
        f"after at least {options.warm_up} steps"
    )


def tokens_per_step(job: JobConfig) -> int:
    """Tokens of one step.

    Args:
        job: the job.
    """
    training = job.training
    return training.microbatches * training.microbatch_size * job.data.sequence_length


def slice_table(measured: Mapping[str, Measured], *, job: JobConfig) -> str:
    """One row a contender; `cores` are those it kept busy, `others' cores` those that other programs did.

    Args:
        measured: by contender.
        job: gives the tokens of a step.
    """
    rows = [
        (
            name,
            f"{tokens_per_step(job) * one.steps / one.wall_s:,.0f}",
            f"{1e3 * one.wall_s / one.steps:.0f}",
            f"{one.cpu_s / one.steps:.2f}",
            f"{one.cpu_s / one.wall_s:.2f}",
            f"{one.others_cpu_s / one.wall_s:.2f}",
            str(one.steps),
            f"{one.losses[-1]:.6f}",
        )
        for name, one in measured.items()
    ]
    header = (
        "contender",
        "tokens/s",
        "step ms",
        "CPU s/step",
        "cores",
        "others' cores",
        "steps",
        "loss",
    )
    return table(header, rows)
