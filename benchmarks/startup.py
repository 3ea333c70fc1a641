"""Wall time from the command to the end of the first step: `deepopt launch` against torchrun.

Both train the same job on the same number of workers with 1F1B. The table says where the time
goes, from the times at which files of the run directory appear and from what workers say of
their set-up. There is no aim: deepopt starts a cluster, a head and a journal, torchrun none of
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from _contenders import deepopt, pipelining
from _machine import describe
from _processes import end_cleanly_on_signals, started
from _report import progress, ratio_line, say, table
from _time_slices import Contender

from deepopt.job_file import dump_job, load_job
from deepopt.run_directory import RunDirectory

LOOK_EVERY_S = 0.02
OURS, PEER = "deepopt launch", "torchrun"

Parts = dict[str, float]


def main() -> None:
    """Start both in turns and print the parts and the ratio."""
    options = _parse()
    end_cleanly_on_signals()
    say("\n".join(describe()))
    size = ", d_model: 64, expert_hidden: 32" if options.quick else ""
    job = load_job(
        None,
        [
            f"model.kwargs={{num_blocks: {2 * options.workers}, tie_embeddings: false{size}}}",
            "pipeline.placement=line",
            "pipeline.schedule=1f1b",
        ],
    )
    say(f"job:      {options.workers} workers, built-in model {job.model.kwargs}, 1f1b")
    say(f"measured: median of {options.rounds} start(s) each, in turns\n")
    starts: dict[str, list[Parts]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        sides: dict[str, tuple[Contender, Callable[[Path, float], Parts]]] = {
            OURS: (deepopt(job_file, workers=options.workers), _our_parts),
            PEER: (pipelining(job_file, workers=options.workers, schedule="1f1b"), _peer_parts),
        }
        for number in range(options.rounds):
            # In reverse every second time, against drift.
            for name in sides if number % 2 == 0 else reversed(sides):
                progress(f"starting {name}")
                contender, read_parts = sides[name]
                out = Path(folder) / f"{number}-{name.replace(' ', '-')}"
                starts[name].append(
                    _start(contender, out, read_parts, timeout_s=options.timeout_s)
                )
    totals = {
        name: statistics.median(sum(parts.values()) for parts in all_parts)
        for name, all_parts in starts.items()
    }
    for name, all_parts in starts.items():
        rows = [
            (part, f"{statistics.median(parts[part] for parts in all_parts):.2f}")
            for part in all_parts[0]
        ]
        say(table((name, "s"), [*rows, ("total", f"{totals[name]:.2f}")]) + "\n")
    say(ratio_line(totals[PEER] / totals[OURS], aim=None))


def _start(
    contender: Contender,
    out: Path,
    read_parts: Callable[[Path, float], Parts],
    *,
    timeout_s: float,
) -> Parts:
    """Start a contender, wait for its first step, end it."""
    steps_file = contender.steps_path(out)
    began, deadline = time.time(), time.monotonic() + timeout_s
    with started(
        contender.arguments(out),
        log=out.with_suffix(".log"),
    ) as running:
        while not (steps_file.exists() and "\n" in steps_file.read_text()):
            if running.check():
                raise RuntimeError(f"{contender.command} ended before its first step")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no step after {timeout_s:.0f} s")
            time.sleep(LOOK_EVERY_S)
        return read_parts(out, began)


def _our_parts(run_dir: Path, began: float) -> Parts:
    """Parts of a deepopt start, one after the other; those of the workers are the last one's."""
    run = RunDirectory(run_dir)
    journal, events = _read_lines(run.journal), _read_lines(run.events)
    ready = [event for event in events if event["kind"] == "worker_ready"]
    # The others wait for it in the rendezvous.
    last = min(ready, key=lambda event: event["setup_s"]["rendezvous"])
    setup_s: Parts = last["setup_s"]
    command = run.job.stat().st_mtime
    supervisor = run.supervisor.stat().st_mtime
    head = _seconds(journal[0]["time"])
    all_ready = max(_seconds(event["time"]) for event in ready)
    first_step = _seconds(_read_lines(run.metrics)[0]["time"])
    return {
        "command line: import, check, plan": command - began,
        "supervisor: process, import": supervisor - command,
        "Ray, then the head: processes, import": head - supervisor,
        "workers: processes and import, beyond the head's": max(
            0.0, all_ready - sum(setup_s.values()) - head
        ),
        **{f"workers: {part}": seconds for part, seconds in setup_s.items()},
        "first step": first_step - all_ready,
    }


def _peer_parts(out: Path, began: float) -> Parts:
    """Parts of the peer's start on rank 0, from its first line."""
    first = _read_lines(out)[0]
    parts, before = {}, began
    for name, moment in first["moments"].items():
        parts[name] = moment - before
        before = moment
    return parts


def _read_lines(path: Path) -> list[dict[str, Any]]:
    whole_lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole_lines]


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=4, help="workers of each side [4]")
    parser.add_argument("--rounds", type=int, help="starts of each side [5, quick: 1]")
    parser.add_argument("--timeout-s", type=float, default=180.0, help="longest start [180]")
    parser.add_argument("--quick", action="store_true", help="small and short: does it run?")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


if __name__ == "__main__":
    main()
