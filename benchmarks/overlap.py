"""Efficiency of steps that overlap: eight emulated ranks, 32 micro-batches, one copy of the weights.

A step that begins before the norms of the one before are known fills the end of that one. The same
plan runs with and without `pipeline.overlap_steps`, in turns, in one group of processes; times are
of steps among others, the first and the last of each turn left out. Devices and links are emulated:
every operation and message takes what the table says, all else is real. A second job, real and small,
says how often clipping took back on text what had run ahead.
"""

from __future__ import annotations

import argparse
import statistics

from _machine import describe
from _processes import end_cleanly_on_signals
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.convert import describe as describe_model
from deepopt.job_file import load_job
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.schedule.search import search
from deepopt.schedule.simulate import simulate
from deepopt.schedule.verify import peak_activations
from deepopt.worker.rehearsal import RehearsalGroup, stand_in

AIM = 0.97
RANKS, MICROBATCHES = 8, 32
OPS_MS, LATENCY_MS = 20.0, 1.3
TEXT_STEPS = 60


def main() -> None:
    """Measure both and print the table and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--turns", type=int, help="of each side [3, quick: 1]")
    parser.add_argument("--steps", type=int, default=7, help="of a turn, two not counted [7]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    turns = options.turns or (1 if options.quick else 3)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    say(
        f"job:      {RANKS} emulated ranks, {MICROBATCHES} micro-batches, F/I/W = "
        f"{OPS_MS:g}/{OPS_MS:g}/{OPS_MS:g} ms a rank, latency {LATENCY_MS:g} ms, one weight copy, "
        "no memory cap"
    )
    say(f"measured: {turns} turn(s) of {options.steps} steps a side, first and last left out\n")
    ratio = _efficiency(turns=turns, steps=options.steps)
    ahead, back, steps = _on_text(4 if options.quick else TEXT_STEPS)
    say(
        f"real text, clipping at 1.0: {ahead} of {steps} steps ran ahead, {back} of them were "
        f"rolled back ({back / max(1, ahead):.0%})\n"
    )
    say("efficiency with overlap: ideal busy time over the median step (emulated)")
    say(ratio_line(ratio, aim=AIM))


def _efficiency(*, turns: int, steps: int) -> float:
    waiting = _emulated_job(overlap=False)
    costs = emulated_costs(waiting, num_layers=RANKS)
    plan = _plan(waiting)
    placement = plan.make_placement()
    stage_costs = costs.table(plan.boundaries, placement=placement)
    rows = []
    efficiency = {}
    with RehearsalGroup(RANKS) as group:
        sides = {}
        for overlap in (False, True):
            found = search(
                placement,
                directions=plan.directions(0),
                costs=stage_costs,
                overlap=overlap,
                effort=200_000,
            )
            name = "overlapping" if overlap else "waiting"
            progress(f"loading {name}: {found.schedule.name}")
            group.load(
                name,
                job=_emulated_job(overlap=overlap),
                plan=plan,
                schedules=(found.schedule,),
            )
            sides[name] = found
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name in sides if turn % 2 == 0 else reversed(sides):
                taken[name] += group.run(name, num_steps=steps).step_s[1:-1]
    for name, found in sides.items():
        busy_s = max(simulate(found.schedule, stage_costs).busy_s)
        step_s = statistics.median(taken[name])
        efficiency[name] = busy_s / step_s
        rows.append(
            (
                name,
                found.schedule.name,
                str(max(peak_activations(found.schedule))),
                f"{1e3 * step_s:.0f}",
                f"{busy_s / step_s:.1%}",
                f"{busy_s / found.makespan_s:.1%}",
                f"{found.makespan_s / step_s:.1%}",
            )
        )
    header = (
        *("steps", "order", "peak activations", "step ms", "efficiency", "simulated"),
        "of simulated",
    )
    say(table(header, rows) + "\n")
    return efficiency["overlapping"]


def _emulated_job(*, overlap: bool) -> JobConfig:
    job = JobConfig.model_validate(
        {
            # A bound that the stand-in never reaches: norms are exchanged and looked at all the same.
            "training": {"microbatches": MICROBATCHES, "grad_clip": 1e3},
            "pipeline": {"overlap_steps": overlap},
            "emulation": {
                "forward_ms": OPS_MS,
                "input_ms": OPS_MS,
                "weight_ms": OPS_MS,
                "latency_ms": LATENCY_MS,
            },
        }
    )
    return stand_in(job, num_layers=RANKS)


def _on_text(steps: int) -> tuple[int, int, int]:
    """Steps that ran ahead, those of them that were rolled back, and all: on real text."""
    progress(f"training {steps} steps on text")
    small = "{d_model: 64, num_blocks: 2, expert_hidden: 32, tie_embeddings: false}"
    job = load_job(None, [f"model.kwargs={small}", "pipeline.overlap_steps=true"])
    num_layers = len(describe_model(job).layers)
    plan = _plan(job, boundaries=(0, num_layers // 2))
    with RehearsalGroup(2) as group:
        group.load("text", job=job, plan=plan)
        first = group.run("text", num_steps=steps).ranks[0]
    return first.num_ran_ahead, first.num_rolled_back, steps


def _plan(job: JobConfig, *, boundaries: tuple[int, ...] = tuple(range(RANKS))) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in describe_model(job).layers),
        boundaries=boundaries,
        placement=PlacementKind.LINE,
        schedule="1f1b",
        pipeline_size=len(boundaries),
        data_size=1,
        num_microbatches=job.training.microbatches,
        num_groups=2,
    )


if __name__ == "__main__":
    main()
