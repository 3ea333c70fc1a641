"""Our plans against the splits that others make: uniform, by parameters, by time; on skewed models.

Peers cut a line as training frameworks do: equally many layers a rank, equal parameters (DeepSpeed's
`partition_method: parameters`: the least greatest sum), equal times (the least greatest sum of measured
times); none of them looks at the speed of a device. Each peer's split runs in 1F1B and in the best order
that our search finds for it, and the faster of the two counts: so the ratio is that of the split, the
placement and the order of devices, and of nothing that a peer could have had by our search. Ours is what
`auto` plans with one copy of the weights.

Simulated for many sizes; then on emulated devices: real processes and messages,
operations take what the table says. The last line is the least ratio of the sets of unlike devices (aim
1.15); no case may be below 1. Times of the exact solvers come first: up to 200 layers on 64 ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from _emulated import Rehearsal, hop_of, load, run_in_turns
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.planner.choose import compare, evaluate, searches
from deepopt.planner.cut import Freedom, cuts
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.outcome import Candidate, Outcome
from deepopt.planner.partition import partition
from deepopt.planner.plan import Plan
from deepopt.planner.shapes import SHAPES
from deepopt.planner.sketch import Pipeline, two_groups
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.rehearsal import RehearsalGroup, stand_in

AIM = 1.15
LAYER_MS = (5.0, 5.5, 4.0)  # F, I and W in the measured ratio of a transformer layer
LATENCY_MS = 1.25
ONE_COPY = tuple(shape for shape in SHAPES if shape.kind is not PlacementKind.MIRROR)
EFFORT = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A chain with skewed costs.

    Args:
        name: what is skewed.
        work: of each layer, in transformer layers.
        parameters: of each layer, in those of a transformer layer.
    """

    name: str
    work: tuple[float, ...]
    parameters: tuple[float, ...]


def models(num_blocks: int) -> tuple[Model, ...]:
    """The three skews.

    Args:
        num_blocks: transformer layers.
    """
    plain = (1.0,) * num_blocks
    moe = tuple(2.2 if index % 2 else 1.0 for index in range(num_blocks))
    experts = tuple(8.0 if index % 2 else 1.0 for index in range(num_blocks))
    return (
        Model(
            name="big embedding",
            work=(0.2, *plain, 4.0),  # a table is looked up; its product with the output is not
            parameters=(8.0, *plain, 8.0),
        ),
        Model(
            name="heavy last layers",
            work=(0.2, *plain[:-4], *(3.0,) * 4, 1.0),
            parameters=(1.0, *plain[:-4], *(3.0,) * 4, 1.0),
        ),
        Model(name="MoE every second", work=(0.2, *moe, 1.0), parameters=(2.0, *experts, 2.0)),
    )


SETS = {
    4: {"equal": (1.0,) * 4, "unlike": (1.0, 1.6, 1.0, 1.3)},
    8: {"equal": (1.0,) * 8, "unlike": (1.0, 1.6, 1.0, 1.3, 1.0, 1.6, 1.0, 1.3)},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", choices=("solvers", "simulated", "emulated"), help="a part of it [all]"
    )
    parser.add_argument(
        "--ranks", type=int, choices=tuple(SETS), help="of simulated cases [both]"
    )
    parser.add_argument("--model", metavar="WORD", default="", help="with it in the name [all]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    if not any(options.model in model.name for model in models(24)):
        names = ", ".join(model.name for model in models(24))
        parser.error(f"--model {options.model}: there are {names}")
    end_cleanly_on_signals()
    say("\n".join(describe()))
    say(f"F/I/W = {'/'.join(map(str, LAYER_MS))} ms a layer, hops of {LATENCY_MS} ms\n")
    ratios: list[tuple[str, float]] = []
    if options.only in (None, "solvers"):
        solver_times(quick=options.quick)
    if options.only in (None, "simulated"):
        ratios += simulated(quick=options.quick, ranks=options.ranks, word=options.model)
    if options.only in (None, "emulated"):
        ratios += emulated(quick=options.quick, word=options.model)
    if not ratios:
        return
    say(f"\nthe least of all {len(ratios)} cases: {min(r for _, r in ratios):.2f} (aim 1.00)")
    say("the least on unlike devices:")
    say(ratio_line(min(ratio for name, ratio in ratios if name == "unlike"), aim=AIM))


def solver_times(*, quick: bool) -> None:
    """Seconds of the exact solvers: ordered and unordered devices, line, V and mirror."""
    rows = []
    for layers, ranks in ((66, 8),) if quick else ((66, 8), (200, 16), (200, 64)):
        work = [1.0 + (7 * layer % 5) / 10 for layer in range(layers)]
        zeros = (0.0,) * layers
        costs = LayerCosts(
            forward_s=tuple(work),
            input_s=zeros,
            weight_s=zeros,
            rank_factor=tuple((1.0, 1.5, 1.25, 1.0)[rank % 4] for rank in range(ranks)),
            source="drawn",
        )
        for shape in (SHAPES[0], SHAPES[4], SHAPES[5]):
            if shape.place(ranks).num_stages > layers:
                continue
            for order in (False, True):
                began = time.process_time()
                cut = cuts(
                    costs,
                    shape,
                    num_ranks=ranks,
                    num_microbatches=2 * ranks,
                    freedom=Freedom(order=order),
                )[0]
                rows.append(
                    (
                        f"{shape}, {'any order' if order else 'ordered'}",
                        str(layers),
                        str(ranks),
                        f"{time.process_time() - began:.2f}",
                        f"{max(0.0, cut.gap):.2%}",
                    )
                )
    say(table(("devices", "layers", "ranks", "CPU s", "gap to bound"), rows) + "\n")


def simulated(*, quick: bool, ranks: int | None, word: str) -> list[tuple[str, float]]:
    """The ratio of every case, with the name of its set of devices."""
    rows, ratios = [], []
    for size in (4,) if quick else SETS if ranks is None else (ranks,):
        counts = (8,) if quick else (8, 16)
        for model in named(word, num_blocks=6 * size):
            for set_name, factors in SETS[size].items():
                for count in counts:
                    progress(f"p={size} m={count} {model.name}, {set_name}")
                    case = Case.of(model, factors, microbatches=count)
                    peers = {
                        name: best_of_peer(case, edges)
                        for name, edges in peer_splits(model, size).items()
                    }
                    ours = our_plan(case)
                    fastest = min(peers.values(), key=lambda one: one.step_s)
                    ratios.append((set_name, fastest.step_s / ours.step_s))
                    rows.append(
                        (
                            f"{model.name}, {set_name}",
                            str(size),
                            str(count),
                            *(f"{1e3 * peers[n].step_s:.1f}" for n in peers),
                            f"{1e3 * ours.step_s:.1f}",
                            f"{ours.shape}, {ours.schedule.name}",
                            f"{ratios[-1][1]:.2f}",
                        )
                    )
    header = ("case", "p", "m", "uniform", "parameters", "time", "ours", "plan", "ratio")
    say("simulated, ms a step\n" + table(header, rows) + "\n")
    return ratios


def named(word: str, *, num_blocks: int) -> list[Model]:
    """The skewed models with a word in their names."""
    return [model for model in models(num_blocks) if word in model.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model on devices.

    Args:
        job: on emulated devices.
        pipeline: the same for the planner.
    """

    job: JobConfig
    pipeline: Pipeline

    @classmethod
    def of(
        cls,
        model: Model,
        factors: Sequence[float],
        *,
        microbatches: int,
        latency_ms: float = LATENCY_MS,
    ) -> Case:
        """A case.

        Args:
            model: its layers.
            factors: of the devices.
            microbatches: of a step.
            latency_ms: of a hop.
        """
        times = {
            name: [ms * work for work in model.work]
            for name, ms in zip(("forward_ms", "input_ms", "weight_ms"), LAYER_MS, strict=True)
        }
        job = stand_in(
            JobConfig.model_validate(
                {
                    "training": {"microbatches": microbatches},
                    "emulation": {**times, "rank_factor": list(factors)},
                }
            ),
            num_layers=len(model.work),
        )
        layers = emulated_costs(job, num_layers=len(model.work))
        return cls(
            job=job,
            pipeline=Pipeline(
                num_ranks=len(factors),
                replicas=two_groups(microbatches),
                layers=dataclasses.replace(layers, latency_s=latency_ms * 1e-3),
                capped_as_1f1b=True,
                freedom=Freedom(order=True),
            ),
        )


def peer_splits(model: Model, ranks: int) -> dict[str, tuple[int, ...]]:
    """First layer of each stage, as others cut."""
    return {
        "uniform": partition([1.0] * len(model.work), ranks),
        "parameters": partition(model.parameters, ranks),
        "time": partition(model.work, ranks),
    }


def best_of_peer(case: Case, edges: tuple[int, ...]) -> Outcome:
    """A peer's split of a line in 1F1B or in the order that our search finds for it."""
    given = dataclasses.replace(case.pipeline, boundaries=edges, freedom=Freedom())
    found = [
        evaluate(
            given,
            candidate=Candidate(shape=SHAPES[0], schedule=schedule),
            effort=EFFORT,
            seed=0,
        )
        for schedule in ("1f1b", "searched")
    ]
    return min((one for one in found if isinstance(one, Outcome)), key=lambda one: one.step_s)


def our_plan(case: Case) -> Outcome:
    """What `auto` plans with one copy of the weights."""
    return compare(case.pipeline, tried=searches(ONE_COPY), effort=EFFORT).best


def emulated(*, quick: bool, word: str) -> list[tuple[str, float]]:
    """The same for four devices with real processes and messages."""
    ranks, count = 4, 8
    rounds, steps = (1, 1) if quick else (3, 3)
    rows, ratios = [], []
    with RehearsalGroup(ranks) as group:
        for model in named(word, num_blocks=24)[: 1 if quick else 3]:
            for set_name, factors in SETS[ranks].items():
                progress(f"emulated: {model.name}, {set_name}")
                case = Case.of(model, factors, microbatches=count)
                uniform = best_of_peer(case, peer_splits(model, ranks)["uniform"])
                first = rehearsal(case, uniform)
                load(group, "first", first)
                group.run("first", num_steps=2)
                hop_s = hop_of(group.run("first", num_steps=1), first)
                case = Case.of(model, factors, microbatches=count, latency_ms=1e3 * hop_s)
                plans = {
                    name: best_of_peer(case, edges)
                    for name, edges in peer_splits(model, ranks).items()
                } | {"ours": our_plan(case)}
                for name, outcome in plans.items():
                    load(group, name, rehearsal(case, outcome))
                run_in_turns(dict.fromkeys(plans, group), rounds=1, steps=1)
                measured = run_in_turns(dict.fromkeys(plans, group), rounds=rounds, steps=steps)
                step_s = {name: statistics.median(times) for name, times in measured.items()}
                best = min(step_s[name] for name in plans if name != "ours")
                ratios.append((set_name, best / step_s["ours"]))
                rows.append(
                    (
                        f"{model.name}, {set_name}",
                        *(f"{1e3 * step_s[name]:.1f}" for name in plans),
                        f"{1e3 * plans['ours'].step_s:.1f}",
                        f"{ratios[-1][1]:.2f}",
                    )
                )
    header = ("case", "uniform", "parameters", "time", "ours", "ours simulated", "ratio")
    say(
        f"emulated: p = {ranks}, m = {count}; ms a step, medians of {rounds} x {steps} steps in turns\n"
        + table(header, rows)
    )
    return ratios


def rehearsal(case: Case, outcome: Outcome) -> Rehearsal:
    """An order with its plan, ready to be loaded into processes."""
    cut, placement = outcome.cut, outcome.schedule.placement
    assert cut is not None, "orders of a case have a cut"
    plan = Plan(
        plan_id=1,
        layer_names=tuple(f"layers.{i}" for i in range(case.pipeline.layers.num_layers)),
        boundaries=cut.boundaries,
        placement=placement.kind,
        schedule="auto",
        pipeline_size=placement.num_ranks,
        data_size=1,
        num_microbatches=outcome.schedule.num_microbatches,
        num_groups=2,
        order=cut.order,
    )
    layers = emulated_costs(case.job, num_layers=case.pipeline.layers.num_layers)
    return Rehearsal(
        job=case.job,
        plan=plan,
        schedule=outcome.schedule,
        costs=layers.table(cut.boundaries, placement=placement),
    )


if __name__ == "__main__":
    main()
