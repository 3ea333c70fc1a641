"""A 175B model on 128 A100s: 1F1B against deepopt's orders over m/p from 1 to 8. All simulated.

GPT-3 175B, tensor parallel 8 inside a host, 16 hosts as 16 pipeline ranks, one sequence a
micro-batch. Costs are analytic (`transformer_costs`); their one free number, the efficiency, is solved from a
published run of the same model on 64 A100s. A step ends with its optimizer update; the mirror is
charged for its second copy: exchange, second update, memory. Every order fits 90 % of the GPU's memory.
docs/scale.md holds the model, its sources and a recorded run; `--picture FILE` draws the chart.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from _chart import line_chart
from _published_a100 import RUN_175B
from _report import progress, ratio_line, say, table

from deepopt.planner.hardware import ACCELERATORS, Cluster
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.transformer_costs import MODELS, transformer_costs
from deepopt.schedule.builders import build
from deepopt.schedule.ir import (
    Direction,
    PlacementKind,
    Schedule,
    directions_of,
    group_bounds,
    place,
)
from deepopt.schedule.memory import Memory, peaks
from deepopt.schedule.search import search
from deepopt.schedule.simulate import Timeline, simulate

MODEL = "gpt3-175b"
NUM_GPUS, TENSOR_PARALLEL = 128, 8
MICROBATCHES_PER_RANK = (1, 2, 3, 4, 6, 8)
MEMORY_SHARE = (
    0.9  # of a GPU for states and activations; the rest is the allocator's and libraries'
)
GROUPS = 2  # training.groups, the default: what a mirror needs at least
SEED, EVALUATIONS = 0, 300  # of orders, by each search
AIM = 1.0  # never slower than 1F1B, at any m/p, with one copy of the weights

LINE, V, MIRROR = PlacementKind.LINE, PlacementKind.V, PlacementKind.MIRROR


class Contender(NamedTuple):
    """An order by its placement.

    Args:
        kind: of placement.
        stages_per_rank: with placement line.
        builder: its name; None for a searched order.
    """

    kind: PlacementKind
    stages_per_rank: int = 1
    builder: str | None = None


BASELINE = "1F1B"
CONTENDERS = {
    BASELINE: Contender(LINE, 1, "1f1b"),
    "1F1B-I, v=3": Contender(LINE, 3, "interleaved_1f1b"),
    "ZB-V": Contender(V, builder="zb_v"),
    "searched line": Contender(LINE),
    "searched line, v=3": Contender(LINE, 3),
    "searched V": Contender(V),
    "searched mirror": Contender(MIRROR),
}
ONE_COPY = ("searched line", "searched line, v=3", "searched V")


class Result(NamedTuple):
    """What a contender takes at one number of micro-batches.

    Args:
        timeline: with exchange and update.
        memory_bytes: states and activations of the fullest GPU.
    """

    timeline: Timeline
    memory_bytes: float


def main() -> None:
    """Fit, simulate, and print the tables and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="m/p of 1 and 2, little search")
    parser.add_argument("--picture", type=Path, help="write the chart to this SVG file")
    options = parser.parse_args()
    loads = MICROBATCHES_PER_RANK[:2] if options.quick else MICROBATCHES_PER_RANK
    evaluations = EVALUATIONS // 20 if options.quick else EVALUATIONS
    efficiency = fit()
    say(f"efficiency {efficiency:.3f}, from {RUN_175B.step_s} s a step on 64 A100s")
    costs = price(NUM_GPUS, efficiency)
    num_ranks = len(costs.memory_bytes)
    say(
        "a layer on one GPU: "
        + ", ".join(
            f"{op} {1e3 * times[1]:.2f} ms"
            for op, times in zip(
                "FIW", (costs.forward_s, costs.input_s, costs.weight_s), strict=True
            )
        )
        + f"; output layer F {1e3 * costs.forward_s[-1]:.2f} ms"
    )
    results: dict[str, list[Result]] = {}
    for name, contender in CONTENDERS.items():
        progress(name)
        results[name] = [
            run(contender, costs, load * num_ranks, evaluations=evaluations) for load in loads
        ]
    report(results, loads, num_ranks)
    if not options.quick:
        sensitivity(costs, results, num_ranks)
    if options.picture is not None:
        options.picture.write_text(chart(results, loads))
    base = results[BASELINE]
    gains = [
        base[i].timeline.makespan_s
        / min(results[name][i].timeline.makespan_s for name in ONE_COPY)
        for i in range(len(loads))
    ]
    say(
        f"the best one-copy order against 1F1B: {max(gains):.2f} at m/p = "
        f"{loads[gains.index(max(gains))]}, least:"
    )
    say(ratio_line(min(gains), aim=AIM))


def price(num_gpus: int, efficiency: float) -> LayerCosts:
    """Costs of the model's layers.

    Args:
        num_gpus: all in one pipeline.
        efficiency: reached part of the A100's rates.
    """
    return transformer_costs(
        MODELS[MODEL],
        cluster=Cluster(accelerator=ACCELERATORS["A100"], num_gpus=num_gpus),
        efficiency=efficiency,
        tensor_parallel=TENSOR_PARALLEL,
        recompute_attention=True,  # as the published run does
    )


def even(num_stages: int) -> tuple[int, ...]:
    """As many blocks in each stage; the embedding joins the first, the output layer the last.

    Args:
        num_stages: a divisor of the model's layers.
    """
    blocks = MODELS[MODEL].num_layers // num_stages
    return (0, *(1 + stage * blocks for stage in range(1, num_stages)))


def fit() -> float:
    """The efficiency at which the published run takes its published time."""
    run_ = RUN_175B
    placement = place(LINE, num_ranks=run_.num_ranks, stages_per_rank=run_.stages_per_rank)
    schedule = build(
        "interleaved_1f1b",
        placement=placement,
        directions=(Direction.DOWN,) * run_.num_microbatches,
    )
    efficiency = 0.5
    for _ in range(20):
        costs = price(run_.num_ranks * run_.tensor_parallel, efficiency)
        timed = simulate(schedule, costs.table(even(placement.num_stages), placement=placement))
        efficiency = min(1.0, efficiency * timed.makespan_s / run_.step_s)
    return efficiency


def run(
    contender: Contender, costs: LayerCosts, num_microbatches: int, *, evaluations: int
) -> Result:
    """Make the order and simulate it.

    Args:
        contender: placement and order.
        costs: of the layers.
        num_microbatches: of a step.
        evaluations: of orders, by a search.
    """
    placement = place(
        contender.kind,
        num_ranks=len(costs.memory_bytes),
        stages_per_rank=contender.stages_per_rank,
    )
    boundaries = even(placement.num_stages)
    states = costs.rank_state_bytes(boundaries, placement=placement)
    activations = costs.per_stage(costs.activation_bytes, boundaries)
    memory = Memory(
        kept=activations,
        full=activations,
        caps=tuple(
            MEMORY_SHARE * most - state
            for most, state in zip(costs.memory_bytes, states, strict=True)
        ),
    )
    stage_costs = costs.table(boundaries, placement=placement)
    sizes = [end - start for start, end in group_bounds(num_microbatches, GROUPS)]
    directions = directions_of(sizes, num_directions=placement.num_directions)
    schedule: Schedule
    if contender.builder is not None:
        schedule = build(contender.builder, placement=placement, directions=directions)
    else:
        schedule = search(
            placement,
            directions=directions,
            costs=stage_costs,
            memory=memory,
            effort=evaluations * 3 * placement.num_stages * num_microbatches,
            seed=SEED,
        ).schedule
    held = zip(states, peaks(schedule, memory), strict=True)
    return Result(simulate(schedule, stage_costs), max(map(sum, held)))


def report(results: dict[str, list[Result]], loads: tuple[int, ...], num_ranks: int) -> None:
    """The tables.

    Args:
        results: of each contender, by m/p.
        loads: m/p.
        num_ranks: p.
    """
    shape = MODELS[MODEL]
    header = ("", *(f"m/p={load}" for load in loads))
    base = results[BASELINE]

    def rows(cell: str, names: tuple[str, ...] = tuple(CONTENDERS)) -> list[tuple[str, ...]]:
        def text(name: str, i: int) -> str:
            timeline, memory_bytes = results[name][i]
            gain = base[i].timeline.makespan_s / timeline.makespan_s
            flops = shape.flops_per_sequence * loads[i] * num_ranks
            peak = NUM_GPUS * ACCELERATORS["A100"].peak_flops
            return {
                "seconds": f"{timeline.makespan_s:.2f}",
                "gain": f"{gain:.3f}",
                "bubble": f"{timeline.bubble:.1%}",
                "mfu": f"{flops / timeline.makespan_s / peak:.1%}",
                "memory": f"{memory_bytes / 1e9:.0f}",
                "overlapped": f"{base[i].timeline.makespan_s / timeline.steady_s:.3f}",
            }[cell]

        return [(name, *(text(name, i) for i in range(len(loads)))) for name in names]

    say("\nSeconds a step (simulated)\n\n" + table(header, rows("seconds")))
    say("\nThroughput against 1F1B\n\n" + table(header, rows("gain")))
    say("\nBubble\n\n" + table(header, rows("bubble")))
    say("\nModel FLOPs utilisation\n\n" + table(header, rows("mfu")))
    say(
        "\nMost memory of a GPU, states and activations (GB)\n\n"
        + table(header, rows("memory"))
    )
    say(
        "\nThroughput against 1F1B where steps overlap (pipeline.overlap_steps)\n\n"
        + table(header, rows("overlapped", tuple(CONTENDERS)[1:]))
        + "\n"
    )


def sensitivity(costs: LayerCosts, results: dict[str, list[Result]], num_ranks: int) -> None:
    """The same orders on slower networks: what the choice of the hop's price decides.

    Args:
        costs: of the layers.
        results: of each contender, by m/p.
        num_ranks: p.
    """
    rows = []
    for factor in (1, 2, 4):
        rate = costs.inter_host_bytes_per_s
        assert rate is not None, "the A100 table has a network rate"
        slower = replace(
            costs,
            inter_host_latency_s=costs.inter_host_latency_s * factor,
            inter_host_bytes_per_s=rate / factor,
        )
        times = {}
        for name, found in results.items():
            schedule = found[1].timeline.schedule
            boundaries = even(schedule.placement.num_stages)
            priced = slower.table(boundaries, placement=schedule.placement)
            times[name] = simulate(schedule, priced).makespan_s
        rows.append(
            (f"x{factor}", *(f"{times[BASELINE] / time:.3f}" for time in times.values()))
        )
    say(f"Throughput against 1F1B at m = {2 * num_ranks}, hops slower, the same orders\n")
    say(table(("hops", *results), rows) + "\n")


def chart(results: dict[str, list[Result]], loads: tuple[int, ...]) -> str:
    """Throughput against 1F1B over m/p, as SVG.

    Args:
        results: of each contender, by m/p.
        loads: m/p.
    """
    base = [result.timeline.makespan_s for result in results[BASELINE]]
    return line_chart(
        {
            name: [b / r.timeline.makespan_s for b, r in zip(base, found, strict=True)]
            for name, found in results.items()
        },
        positions=loads,
        title="GPT-3 175B on 128 A100s, throughput against 1F1B (simulated)",
        x_label="micro-batches / pipeline ranks (m/p, p = 16)",
        step=0.1,
    )


if __name__ == "__main__":
    main()
