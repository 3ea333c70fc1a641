"""What fault tolerance costs while nothing fails: all of it on against off, in time slices.

On: heartbeats twice a second, copies of each worker's layers in a peer's memory, a checkpoint every ten
steps. Off: a heartbeat an hour, no copies, no checkpoint. What cannot be switched off is on in both: head,
agent, the report of a step, and the exchange that every update waits for, which norms need anyway.

Twice: with workers that keep all cores busy, where each microsecond of these threads is taken from
training; and on emulated devices, where cores are free, as beside GPUs. The stall of a checkpoint is what
the step after it takes more than others, by the workers' own clocks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from _contenders import deepopt, measure_slices, parse_slices, say_job, slice_table
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say
from _time_slices import Measured

from deepopt.job_file import dump_job, load_job

AIM = 0.97  # 3 %
STALL_AIM = 0.01  # of the time of the ten steps between two checkpoints
EVERY = 10
WORKERS = 2
ON, OFF = "all on", "all off"
COPIES, CHECKPOINTS = "faults.replicas=peer", f"checkpoint.every={EVERY}"
NO_COPIES, NO_CHECKPOINTS = "faults.replicas=none", "checkpoint.every=0"
NO_HEARTBEATS = "faults.heartbeat_s=3000"
SETTINGS = {
    ON: (COPIES, CHECKPOINTS),
    OFF: (NO_COPIES, NO_CHECKPOINTS, NO_HEARTBEATS),
}
# With `--parts`, to see what costs how much: one of them on, the others off.
PARTS = {
    "copies": (COPIES, NO_CHECKPOINTS, NO_HEARTBEATS),
    "checkpoints": (NO_COPIES, CHECKPOINTS, NO_HEARTBEATS),
    "heartbeats": (NO_COPIES, NO_CHECKPOINTS),
}
# What it says, and further settings of both. Emulated layers must take longer than their real
# arithmetic, or no core is free: the parameters, which are copied, are the same, the micro-batches small.
KINDS = {
    "busy cores": (),
    "emulated devices": (
        "worker.device=emulated",
        "emulation={forward_ms: 10, input_ms: 11, weight_ms: 8}",
        "data.sequence_length=16",
        "training.microbatch_size=1",
    ),
}


def main() -> None:
    """Measure both kinds of devices and print tables, shares and the ratio."""
    options = parse_slices(__doc__, parts="each part alone as well", only=tuple(KINDS))
    end_cleanly_on_signals()
    say("\n".join(describe()))
    kinds = [options.only] if options.only else list(KINDS)
    ratios = [_measure(kind, options) for kind in kinds]
    say(ratio_line(min(ratios), aim=AIM))


def _measure(kind: str, options: argparse.Namespace) -> float:
    """The ratio of one kind of devices: steps a second with everything on over off."""
    small = ["model.kwargs={d_model: 64, expert_hidden: 32}"] if options.quick else []
    job = load_job(None, ["pipeline.placement=line", *KINDS[kind], *small])
    say(f"\n{kind}")
    say_job(job, workers=WORKERS, options=options)
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        contenders = {
            name: deepopt(job_file, workers=WORKERS, settings=settings)
            for name, settings in (SETTINGS | (PARTS if options.parts else {})).items()
        }
        measured = measure_slices(contenders, job=job, options=options)
    say("\n" + slice_table(measured, job=job) + "\n")
    on, off = measured[ON], measured[OFF]
    for name in [name for name in measured if name != OFF]:
        say(f"{kind}: {_cost(name, measured[name], beside=off)}")
    say(f"{kind}: {_stall(on)}")
    return (off.wall_s / off.steps) / (on.wall_s / on.steps)


def _cost(name: str, measured: Measured, *, beside: Measured) -> str:
    """What a contender's steps take of the time of another's."""
    wall, cpu = (
        (getattr(measured, field) / measured.steps) / (getattr(beside, field) / beside.steps)
        for field in ("wall_s", "cpu_s")
    )
    median = statistics.median(measured.step_times_s.values()) / statistics.median(
        beside.step_times_s.values()
    )
    return (
        f"{name} takes {_percent(wall)} of the wall time of {OFF}, {_percent(cpu)} of its CPU time; "
        f"median step {_percent(median)}"
    )


def _stall(on: Measured) -> str:
    """What a checkpoint holds up, as a share of the steps between two of them."""
    after = [s for step, s in on.step_times_s.items() if step % EVERY == 1]
    others = [s for step, s in on.step_times_s.items() if step % EVERY not in (0, 1)]
    if not after or not others:
        return "too few steps for the stall of a checkpoint"
    usual_s = statistics.median(others)
    stall_s = statistics.median(after) - usual_s
    return (
        f"the step after a checkpoint takes {1e3 * stall_s:.1f} ms more than the others' "
        f"{1e3 * usual_s:.1f} ms: {100 * stall_s / (EVERY * usual_s):.2f} % of {EVERY} steps "
        f"(aim {100 * STALL_AIM:g} %; median of {len(after)})"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
