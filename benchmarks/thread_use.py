"""Where the CPU time of a step goes, by process and thread: deepopt's 1F1B and torch's.

The job, the contenders and the time slices of `throughput.py`; beside CPU time it shows page faults and
switches, which a slower machine does not change. The ratio is of CPU time a step of all processes,
torch's over deepopt's: it counts what Ray, head and agent take, which is nothing on torch's side.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _contenders import deepopt, measure_slices, parse_slices, pipelining, say_job
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say, table
from _thread_use import Use, by_role
from _time_slices import Measured
from throughput import OURS, PEERS, WORKERS, make_job

from deepopt.job_file import dump_job

AIM = 1.00
OUR, PEER = "deepopt 1f1b", "torch Schedule1F1B"
_LEAST_MS = 0.05  # a step: what takes less is left out of the table, not of the sums


def main() -> None:
    """Run both in turns and print a table each and the ratio."""
    options = parse_slices(__doc__)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    job = make_job(quick=options.quick)
    say_job(job, workers=WORKERS, options=options)
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        contenders = {
            OUR: deepopt(job_file, workers=WORKERS, settings=OURS[OUR]),
            PEER: pipelining(job_file, workers=WORKERS, schedule=PEERS[PEER]),
        }
        measured = measure_slices(contenders, job=job, options=options)
    for name, one in measured.items():
        say(f"\n{name}, a step of {one.steps}\n\n{_table(one)}")
    per_step = {name: _sum(one).cpu_s / one.steps for name, one in measured.items()}
    say("\n" + ratio_line(per_step[PEER] / per_step[OUR], aim=AIM))


def _table(measured: Measured) -> str:
    used = by_role(measured.threads_before, measured.threads_after)
    rows = [
        _row(role, name, use, steps=measured.steps)
        for (role, name), use in used.items()
        if 1e3 * use.cpu_s / measured.steps >= _LEAST_MS
    ]
    rows.append(_row("all", "", _sum(measured), steps=measured.steps))
    return table(
        ("process", "thread", "CPU ms", "system %", "faults", "yields", "preemptions"), rows
    )


def _row(role: str, name: str, use: Use, *, steps: int) -> tuple[str, ...]:
    ticks_s = use.user_s + use.system_s
    return (
        role,
        name,
        f"{1e3 * use.cpu_s / steps:.1f}",
        f"{100 * use.system_s / ticks_s:.0f}" if ticks_s else "-",
        f"{use.faults / steps:.0f}",
        f"{use.yields / steps:.1f}",
        f"{use.preemptions / steps:.1f}",
    )


def _sum(measured: Measured) -> Use:
    used = by_role(measured.threads_before, measured.threads_after)
    return sum(used.values(), start=Use())


if __name__ == "__main__":
    main()
