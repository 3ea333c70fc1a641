"""Are schedules found quickly, and how far from the best that can be: simulated, homogeneous layers.

For each size, `auto` compares all placements (line v = 1..4, V, mirror) at the launch's effort per
placement or more, and searches the best two longer; CPU seconds of one core count whole. The gap is that of
the chosen order to its own lower bound, which knows the memory: p micro-batches a rank as in 1F1B (p + 1
with mirror), unless the case gives more. There is no peer for time and gap: the ratios are the aims over what
was found (10 s at p=8, m=32; 120 s at p=64, m=256; 1 % at m >= 2p). The peer of the gain is 1F1B at the same
costs: the aim is 1.40 at p = 8, for m = 8 in 1F1B's memory and for m = 16 in that of 10 micro-batches,
because in 1F1B's the bound is below it. The last line is the worst of all ratios.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.planner.choose import LAUNCH_EFFORT, Comparison, compare, searches
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.sketch import Pipeline, two_groups

AIM_GAP = 0.01
AIM_GAIN = 1.40
LAYER_MS = (20.0, 22.0, 16.0)  # F, I and W of a transformer layer, measured
LAYERS_PER_RANK = 12  # so that v = 1, 2, 3 and 4 cut evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size.

    Args:
        ranks: p.
        microbatches: m.
        latency_ms: of a hop.
        effort: actions a placement.
        aim_s: CPU seconds; None where none is set.
        in_flight: micro-batches that a rank's memory holds; None: as many as 1F1B holds.
        aims_at_gain: whether `AIM_GAIN` over 1F1B is claimed.
    """

    ranks: int
    microbatches: int
    latency_ms: float
    effort: int = LAUNCH_EFFORT
    aim_s: float | None = None
    in_flight: float | None = None
    aims_at_gain: bool = False


QUICK = (
    Case(ranks=4, microbatches=8, latency_ms=0.0),
    Case(ranks=4, microbatches=8, latency_ms=1.25),
)
FULL = (
    *QUICK,
    Case(ranks=8, microbatches=8, latency_ms=1.25, effort=1_000_000, aims_at_gain=True),
    Case(ranks=8, microbatches=16, latency_ms=0.0, effort=1_000_000),
    Case(ranks=8, microbatches=16, latency_ms=1.25, effort=1_000_000),
    Case(
        ranks=8,
        microbatches=16,
        latency_ms=1.25,
        effort=1_000_000,
        in_flight=10.0,
        aims_at_gain=True,
    ),
    Case(ranks=8, microbatches=32, latency_ms=0.0, effort=600_000, aim_s=10.0),
    Case(ranks=8, microbatches=32, latency_ms=1.25, effort=600_000, aim_s=10.0),
    Case(ranks=64, microbatches=256, latency_ms=0.0, effort=1_000_000, aim_s=120.0),
)


def main() -> None:
    """Search every size, print the table and the worst ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="p = 4 alone")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="P", help="of the cases [all]")
    parser.add_argument("--microbatches", type=int, nargs="+", metavar="M", help="[all]")
    options = parser.parse_args()
    cases = [
        case
        for case in (QUICK if options.quick else FULL)
        if case.ranks in (options.ranks or [case.ranks])
        and case.microbatches in (options.microbatches or [case.microbatches])
    ]
    if not cases:
        sizes = dict.fromkeys((case.ranks, case.microbatches) for case in FULL)
        parser.error(
            "no such case: " + ", ".join(f"p={p} m={m}" for p, m in sizes) + " are there"
        )
    say("\n".join(describe()))
    say(f"simulated; F/I/W = {'/'.join(f'{t:g}' for t in LAYER_MS)} ms a rank\n")
    rows, ratios = [], []
    for case in cases:
        progress(f"p={case.ranks} m={case.microbatches} latency {case.latency_ms} ms")
        began = time.process_time()
        found = search(case)
        took_s = time.process_time() - began
        best = found.best
        assert best.gap is not None, "no cores are shared here"
        assert found.one_f_one_b_s is not None, "there are more layers than ranks"
        gain = found.one_f_one_b_s / best.step_s
        verdicts = []
        if case.aim_s is not None:
            verdicts.append(("time", case.aim_s / took_s))
        if case.microbatches >= 2 * case.ranks:
            verdicts.append(("gap", AIM_GAP / max(best.gap, 1e-9)))
        if case.aims_at_gain:
            verdicts.append(("gain", gain / AIM_GAIN))
        ratios += [ratio for _, ratio in verdicts]
        rows.append(
            (
                f"{case.ranks}",
                f"{case.microbatches}",
                f"{case.latency_ms:g}",
                f"{best.shape}, {best.schedule.name}",
                f"{took_s:.1f}",
                f"{best.gap:.2%}",
                f"{best.timeline.bubble:.1%}",
                f"{gain:.2f}",
                f"{max(best.peak_activations):.3g}",
                f"{best.weight_copies}",
                " ".join(f"{name} {min(ratio, 99):.2f}" for name, ratio in verdicts),
            )
        )
    header = (
        "p",
        "m",
        "hop (ms)",
        "chosen",
        "CPU s",
        "gap",
        "bubble",
        "x 1F1B",
        "in flight",
        "copies",
        "aim over found",
    )
    say(table(header, rows) + "\n")
    say("the worst of all aims:")
    say(ratio_line(min(ratios), aim=1.0))


def search(case: Case) -> Comparison:
    """What `auto` finds for one size.

    Args:
        case: the size.
    """
    num_layers = LAYERS_PER_RANK * case.ranks
    forward, inputs, weight = ((1e-3 * ms / LAYERS_PER_RANK,) * num_layers for ms in LAYER_MS)
    costs = LayerCosts(
        forward_s=forward,
        input_s=inputs,
        weight_s=weight,
        latency_s=1e-3 * case.latency_ms,
        source="transformer layer",
    )
    pipeline = Pipeline(
        num_ranks=case.ranks,
        replicas=two_groups(case.microbatches),
        layers=costs,
        memory_cap=case.in_flight,
        capped_as_1f1b=case.in_flight is None,
    )
    return compare(pipeline, tried=searches(), effort=case.effort)


if __name__ == "__main__":
    main()
