"""One of four ranks 1.6 times slower: boundaries fitted to the ranks, on emulated devices.

The capacity of the ranks is the sum of their speeds; a step that keeps all of them busy all the time
takes the work over the capacity. torch's schedules cut equally many layers for each rank. Ours:
the same cut with a searched order, and cuts that the planner fits to the ranks' speeds.
"""

from __future__ import annotations

import argparse
import statistics

from _emulated import Costs, Rehearsal, hop_of, load, plan_rehearsal, run_in_turns
from _machine import describe
from _peer_emulated import PEERS, PeerRank
from _processes import end_cleanly_on_signals
from _report import progress, ratio_line, say, table

from deepopt.planner.cut import NO_FREEDOM, cuts
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.shapes import Shape
from deepopt.schedule.ir import PlacementKind, place
from deepopt.worker.rehearsal import RehearsalGroup

FACTORS = (1.0, 1.0, 1.6, 1.0)
RANKS = len(FACTORS)
LAYERS = 32
RANK_MS = (20.0, 22.0, 16.0)
AIM = 0.90
PEER_NAMES = ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=16, help="of a step [16]")
    parser.add_argument("--rounds", type=int, help="turns of each contender [3, quick: 1]")
    parser.add_argument("--steps", type=int, help="measured steps of a turn [3, quick: 1]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    steps = options.steps or (1 if options.quick else 3)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    costs = Costs.of_rank(RANK_MS, ranks=RANKS, layers=LAYERS, skew=False)
    with RehearsalGroup(RANKS) as ours, RehearsalGroup(RANKS, make=PeerRank) as theirs:
        for name in PEER_NAMES:
            _load_peer(theirs, name, costs, microbatches=options.microbatches)
        rehearsals, hop_s = _rehearsals(costs, ours, microbatches=options.microbatches)
        say(
            f"emulated: p = {RANKS}, m = {options.microbatches}, {LAYERS} layers, F/I/W = 20/22/16 "
            f"ms a rank of factor 1, factors {', '.join(f'{f:g}' for f in FACTORS)}; latency "
            f"{hop_s * 1e3:.2f} ms measured; memory of {RANKS + 1} micro-batches of {LAYERS // RANKS} "
            f"layers; medians of {rounds} x {steps} steps in turns"
        )
        groups = {f"torch {name}": theirs for name in PEER_NAMES} | dict.fromkeys(
            rehearsals, ours
        )
        run_in_turns(groups, rounds=1, steps=1)
        measured = run_in_turns(groups, rounds=rounds, steps=steps)
    step_s = {name: statistics.median(times) for name, times in measured.items()}
    capacity = sum(1 / factor for factor in FACTORS)
    ideal_s = options.microbatches * costs.work_ms * 1e-3 / capacity
    rows = []
    for name, seconds in step_s.items():
        one: Rehearsal | None = rehearsals.get(name)
        rows.append(
            (
                name,
                "1" if one is None else str(one.copies),
                "equal" if one is None else _layers_of_ranks(one),
                f"{seconds * 1e3:.1f}",
                f"{100 * ideal_s / seconds:.1f}",
                "-" if one is None else f"{one.simulated_s(hop_s) * 1e3:.1f}",
            )
        )
    header = (
        "contender",
        "weight copies",
        "layers a rank",
        "step ms",
        "of capacity %",
        "simulated ms",
    )
    say("\n" + table(header, rows))
    fitted = [n for n, one in rehearsals.items() if "fitted" in n and one.copies == 1]
    best = min(fitted, key=lambda name: step_s[name])
    best_peer = min(step_s[f"torch {name}"] for name in PEER_NAMES)
    say(f"\nbest peer / {best}: {ratio_line(best_peer / step_s[best], aim=None)}")
    say(f"share of the capacity, {best}")
    say(ratio_line(ideal_s / step_s[best], aim=AIM))


def _load_peer(group: RehearsalGroup, name: str, costs: Costs, *, microbatches: int) -> None:
    peer = PEERS[name]
    stages = RANKS * peer.stages_per_rank
    kind = PlacementKind.V if peer.folded else PlacementKind.LINE
    per_rank = 1 if peer.folded else peer.stages_per_rank
    ranks = place(kind, num_ranks=RANKS, stages_per_rank=per_rank).down
    slowed = {
        key: tuple(t * FACTORS[r] for t, r in zip(times, ranks, strict=True))
        for key, times in costs.per_stage(stages).items()
    }
    group.load(
        f"torch {name}",
        peer=name,
        num_microbatches=microbatches,
        update_s=(0.0,) * stages,
        **slowed,
    )


def _rehearsals(
    costs: Costs, group: RehearsalGroup, *, microbatches: int
) -> tuple[dict[str, Rehearsal], float]:
    """What we run, loaded, and the latency that was measured for it."""
    emulation = {"rank_factor": FACTORS}
    common = {"ranks": RANKS, "microbatches": microbatches, "emulation": emulation}
    found = {
        "1F1B, equal": plan_rehearsal(costs, kind=PlacementKind.LINE, schedule="1f1b", **common)
    }
    load(group, "1F1B, equal", found["1F1B, equal"])
    group.run("1F1B, equal", num_steps=2)
    hop_s = statistics.median(
        hop_of(group.run("1F1B, equal", num_steps=1), found["1F1B, equal"]) for _ in range(3)
    )
    common |= {"most_in_flight": RANKS + 1, "hop_s": hop_s}
    progress("searching orders")
    found["V, equal"] = plan_rehearsal(costs, kind=PlacementKind.V, **common)
    layer_costs = emulated_costs(found["V, equal"].job, num_layers=LAYERS)
    for words, shape in (
        ("V, fitted", Shape(kind=PlacementKind.V, stages_per_rank=2)),
        ("line v=4, fitted", Shape(kind=PlacementKind.LINE, stages_per_rank=4)),
        ("mirror, fitted", Shape(kind=PlacementKind.MIRROR)),
    ):
        found[words] = plan_rehearsal(
            costs,
            kind=shape.kind,
            stages_per_rank=shape.stages_per_rank,
            boundaries=cuts(
                layer_costs,
                shape,
                num_ranks=RANKS,
                num_microbatches=microbatches,
                freedom=NO_FREEDOM,
            )[0].boundaries,
            **common,
        )
    for name in list(found)[1:]:
        load(group, name, found[name])
    return found, hop_s


def _layers_of_ranks(rehearsal: Rehearsal) -> str:
    plan = rehearsal.plan
    counts = [
        sum(len(plan.stage_layers(stage)) for stage in plan.held_stages(rank))
        for rank in range(RANKS)
    ]
    return "/".join(map(str, counts))


if __name__ == "__main__":
    main()
