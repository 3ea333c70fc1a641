"""Does the simulator take a pipeline of 1,024 ranks and 4,096 micro-batches: time and memory.

Each order is built and simulated in a process of its own, on one core, whose time and peak memory
count whole (interpreter included). Costs are a transformer layer's measured ratio with a latency and
a transfer time per hop, hosts of 8 ranks, so that no rank runs in step with its neighbours. There
is no peer: the ratio is what the aims allow (60 s, 4 GiB) over what the worst order takes. Orders
made by the list scheduler (bi-stream, V-Half, searched) are not among them: they cost 10 to 20 times as much
to build, and are made for the sizes that are trained with.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.schedule.builders import BUILDERS, build_compact
from deepopt.schedule.ir import Direction, place
from deepopt.schedule.simulate import CostTable, simulate_compact

AIM_S, AIM_BYTES = 60.0, 4 * 2**30
ORDERS = ("1f1b", "gpipe", "zb_h1", "zb_h2", "zb_v")
RANKS_PER_HOST = 8
QUICK, FULL = (64, 256), (1024, 4096)


def main() -> None:
    """Run every order in its own process and print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 ranks, 256 micro-batches")
    parser.add_argument("--one", choices=ORDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    num_ranks, num_microbatches = QUICK if options.quick else FULL
    if options.one:
        say(json.dumps(measure(options.one, num_ranks, num_microbatches)))
        return
    say("\n".join(describe()))
    say(f"p = {num_ranks}, m = {num_microbatches}; simulated\n")
    rows, ratios = [], []
    for name in ORDERS:
        progress(name)
        command = [sys.executable, __file__, "--one", name] + ["--quick"] * options.quick
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        one = json.loads(done.stdout)
        rows.append(
            (
                name,
                f"{one['actions'] / 1e6:.1f}",
                f"{one['build_s']:.1f}",
                f"{one['simulate_s']:.1f}",
                f"{one['peak_bytes'] / 2**30:.2f}",
                f"{one['bubble']:.1%}",
            )
        )
        ratios += [
            AIM_S / (one["build_s"] + one["simulate_s"]),
            AIM_BYTES / one["peak_bytes"],
        ]
    header = ("order", "million actions", "build (s)", "simulate (s)", "peak GiB", "bubble")
    say(table(header, rows) + "\n")
    say(f"aims: {AIM_S:.0f} s, {AIM_BYTES / 2**30:.0f} GiB; the worst of all cells:")
    say(ratio_line(min(ratios), aim=1.0))


def measure(name: str, num_ranks: int, num_microbatches: int) -> dict[str, float]:
    """CPU seconds of building and simulating one order, and the peak memory of this process.

    Args:
        name: of a builder.
        num_ranks: pipeline ranks.
        num_microbatches: of a step.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    placement = place(BUILDERS[name].placements[0], num_ranks=num_ranks)
    share = num_ranks / placement.num_stages
    stages = (share,) * placement.num_stages
    costs = CostTable(
        forward_s=tuple(20e-3 * s for s in stages),
        input_s=tuple(22e-3 * s for s in stages),
        weight_s=tuple(16e-3 * s for s in stages),
        latency_s=10e-6,
        transfer_s=0.1e-3,
        host_of=tuple(rank // RANKS_PER_HOST for rank in range(num_ranks)),
        inter_host_latency_s=20e-6,
        inter_host_transfer_s=1e-3,
    )
    start = time.process_time()
    schedule = build_compact(
        name, placement=placement, directions=(Direction.DOWN,) * num_microbatches
    )
    built = time.process_time()
    timeline = simulate_compact(schedule, costs)
    return {
        "actions": schedule.num_actions,
        "build_s": built - start,
        "simulate_s": time.process_time() - built,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bubble": timeline.bubble,
    }


if __name__ == "__main__":
    main()
