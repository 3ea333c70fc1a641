"""Recompute in bubbles against recompute inside the backward, on emulated devices, in the same memory.

Activations are recomputed: a micro-batch holds the inputs of its layers until its forward is
repeated, and all activations from then to the end of W. One side lets the search place the repetition
(R) by itself, into bubbles before the gradient arrives; the other begins each I with it. Both
orders are searched, in memory of the same size, and run by the same executor.
"""

from __future__ import annotations

import argparse
import statistics

from _emulated import Costs, Rehearsal, hop_of, load, plan_rehearsal, run_in_turns
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say, table

from deepopt.schedule.ir import PlacementKind, place
from deepopt.schedule.memory import Memory, peaks
from deepopt.worker.rehearsal import RehearsalGroup

RANKS = 4
LAYERS_PER_RANK = 4
RANK_MS = (20.0, 22.0, 16.0)
KEPT_SHARE = 1 / 8  # of a layer's activations are its input: 34 bytes an element, and 2 for it
FULL_MICROBATCHES = 3.0  # all activations of so many micro-batches fit beside the inputs of
KEPT_MICROBATCHES = 8.0  # so many


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=8, help="of a step [8]")
    parser.add_argument("--rounds", type=int, help="turns of each contender [4, quick: 1]")
    parser.add_argument("--steps", type=int, help="measured steps of a turn [4, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 4)
    steps = options.steps or (1 if options.quick else 4)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    costs = Costs.of_rank(RANK_MS, ranks=RANKS, layers=LAYERS_PER_RANK * RANKS, skew=False)
    common = {"ranks": RANKS, "microbatches": options.microbatches, "recompute": True}
    with RehearsalGroup(RANKS) as group:
        plain = plan_rehearsal(costs, kind=PlacementKind.LINE, schedule="1f1b", **common)
        load(group, "1F1B, B repeats", plain)
        group.run("1F1B, B repeats", num_steps=2)
        hop_s = statistics.median(
            hop_of(group.run("1F1B, B repeats", num_steps=1), plain) for _ in range(5)
        )
        say(
            f"emulated: p = {RANKS}, m = {options.microbatches}, F/I/W/R = 20/22/16/20 ms a rank, "
            f"latency {hop_s * 1e3:.2f} ms measured; memory of {FULL_MICROBATCHES:g} micro-batches "
            f"with all activations and {KEPT_MICROBATCHES:g} with their inputs "
            f"({KEPT_SHARE:.3g} of them); medians of {rounds} x {steps} steps in turns"
        )
        pairs: dict[str, Rehearsal] = {"1F1B, B repeats": plain}
        for kind in (PlacementKind.V, PlacementKind.MIRROR):
            for words, apart in (("I repeats", False), ("R in bubbles", True)):
                pairs[f"{kind}, {words}"] = plan_rehearsal(
                    costs,
                    kind=kind,
                    memory=_memory(kind),
                    hop_s=hop_s,
                    prepare_apart=apart,
                    **common,
                )
                load(group, f"{kind}, {words}", pairs[f"{kind}, {words}"])
        groups = dict.fromkeys(pairs, group)
        run_in_turns(groups, rounds=1, steps=1)
        measured = run_in_turns(groups, rounds=rounds, steps=steps)
    step_s = {name: statistics.median(times) for name, times in measured.items()}
    rows = []
    for name, one in pairs.items():
        simulated_s = one.simulated_s(hop_s)
        held = max(peaks(one.schedule, _memory(one.plan.placement)))
        rows.append(
            (
                name,
                str(one.copies),
                f"{held:.2f}",
                f"{step_s[name] * 1e3:.1f}",
                f"{simulated_s * 1e3:.1f}",
                f"{100 * simulated_s / step_s[name]:.1f}",
            )
        )
    header = ("order", "weight copies", "peak memory", "step ms", "simulated ms", "share %")
    say("\n" + table(header, rows))
    say("\npeak memory in micro-batches with all activations of a rank's layers")
    ratios = {
        kind: step_s[f"{kind}, I repeats"] / step_s[f"{kind}, R in bubbles"]
        for kind in (PlacementKind.MIRROR, PlacementKind.V)
    }
    say(
        f"mirror, I repeats / R in bubbles: {ratio_line(ratios[PlacementKind.MIRROR], aim=None)}"
    )
    say("v, I repeats / R in bubbles, step times")
    say(ratio_line(ratios[PlacementKind.V], aim=None))


def _memory(kind: PlacementKind) -> Memory:
    """In micro-batches with all activations of a rank's layers, each stage its share."""
    placement = place(kind, num_ranks=RANKS)
    share = RANKS / placement.num_stages
    cap = FULL_MICROBATCHES + KEPT_MICROBATCHES * KEPT_SHARE
    return Memory(
        kept=(KEPT_SHARE * share,) * placement.num_stages,
        full=(share,) * placement.num_stages,
        caps=(cap,) * RANKS,
    )


if __name__ == "__main__":
    main()
