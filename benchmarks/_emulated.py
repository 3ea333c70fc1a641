"""Plans on emulated devices, ready to run in turns: what the emulated benchmarks have in common."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from deepopt.config import JobConfig
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan import Plan
from deepopt.schedule.builders import build
from deepopt.schedule.ir import RECEIVE_OPS, Op, PlacementKind, Schedule, place
from deepopt.schedule.memory import Memory
from deepopt.schedule.search import search
from deepopt.schedule.simulate import CostTable, simulate
from deepopt.schedule.verify import peak_activations
from deepopt.worker.rehearsal import RehearsalGroup, Rehearsed, stand_in

_SHORTEST_WAIT_NS = 1_000_000  # a receive that waited so long was there before its tensor
_SEED = 0
_NEVER_CLIPS = (
    1e3  # far above any norm of the stand-in; norms are exchanged and looked at all the same
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Milliseconds of each layer on one micro-batch.

    Args:
        forward_ms: F.
        input_ms: I.
        weight_ms: W.
    """

    forward_ms: tuple[float, ...]
    input_ms: tuple[float, ...]
    weight_ms: tuple[float, ...]

    @classmethod
    def of_rank(
        cls, rank_ms: tuple[float, float, float], *, ranks: int, layers: int, skew: bool
    ) -> Costs:
        """Costs of layers from those of a rank.

        Args:
            rank_ms: F, I and W of one rank's layers together.
            ranks: that share the layers.
            layers: of the model.
            skew: draw each figure between half and one and a half of its mean.
        """
        draw = random.Random(_SEED)
        return cls(
            **{
                key: tuple(
                    total * ranks / layers * (draw.uniform(0.5, 1.5) if skew else 1.0)
                    for _ in range(layers)
                )
                for key, total in zip(
                    ("forward_ms", "input_ms", "weight_ms"), rank_ms, strict=True
                )
            }
        )

    @property
    def work_ms(self) -> float:
        """All layers, one micro-batch."""
        return sum(self.forward_ms) + sum(self.input_ms) + sum(self.weight_ms)

    def per_stage(self, num_stages: int) -> dict[str, tuple[float, ...]]:
        """Seconds of stages of equally many layers, by the peer's names."""
        size = len(self.forward_ms) // num_stages
        return {
            key: tuple(
                sum(getattr(self, name)[i * size : (i + 1) * size]) * 1e-3
                for i in range(num_stages)
            )
            for key, name in (
                ("forward_s", "forward_ms"),
                ("input_s", "input_ms"),
                ("weight_s", "weight_ms"),
            )
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """A plan that can be loaded into a group, and what is known of it without running it.

    Args:
        job: of a stand-in model on emulated devices.
        plan: who holds what.
        schedule: the order.
        costs: of its stages, without the real latency of messages.
        overlaps: whether its steps overlap.
    """

    job: JobConfig
    plan: Plan
    schedule: Schedule
    costs: CostTable
    overlaps: bool = False

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return 2 if self.plan.placement is PlacementKind.MIRROR else 1

    @property
    def peak(self) -> float:
        """Most micro-batches in flight on a rank, each through all of the rank's own layers."""
        per_rank = self.plan.num_stages / self.plan.pipeline_size
        return max(peak_activations(self.schedule)) / per_rank

    def simulated_s(self, hop_s: float) -> float:
        """The step as simulated; where steps overlap, one among others.

        Args:
            hop_s: measured latency of a message.
        """
        timeline = simulate(self.schedule, with_hop(self.costs, hop_s))
        return timeline.steady_s if self.overlaps else timeline.makespan_s


def with_hop(costs: CostTable, hop_s: float) -> CostTable:
    """Costs with the latency that a real message has on this machine.

    Args:
        costs: of stages.
        hop_s: measured.
    """
    return dataclasses.replace(costs, latency_s=costs.latency_s + hop_s)


def plan_rehearsal(
    costs: Costs,
    *,
    kind: PlacementKind,
    ranks: int,
    microbatches: int,
    stages_per_rank: int = 1,
    schedule: str | None = None,
    most_in_flight: float | None = None,
    memory: Memory | None = None,
    boundaries: Sequence[int] | None = None,
    hop_s: float = 0.0,
    emulation: Mapping[str, object] | None = None,
    recompute: bool = False,
    prepare_apart: bool = True,
    overlap: bool = False,
) -> Rehearsal:
    """A stand-in job, its plan and its order: a builder's, or the best that a search finds.

    Args:
        costs: of the layers.
        kind: of placement.
        ranks: of the pipeline.
        microbatches: of a step.
        stages_per_rank: with placement line.
        schedule: name of a builder; None: search.
        most_in_flight: memory of a rank in micro-batches through all of its layers; None: any.
        memory: instead of that: sizes by stage, capacities by rank.
        boundaries: first layer of each stage; None: equally many layers each.
        hop_s: latency that the search reckons with.
        emulation: further keys of the job's `emulation` section.
        recompute: whether activations are recomputed.
        prepare_apart: whether the search may place R by itself; else each I begins with it.
        overlap: `pipeline.overlap_steps`; no norm reaches its bound then.
    """
    layers = len(costs.forward_ms)
    placement = place(kind, num_ranks=ranks, stages_per_rank=stages_per_rank)
    stages = placement.num_stages
    edges = tuple(boundaries or (stage * layers // stages for stage in range(stages)))
    job = stand_in(
        JobConfig.model_validate(
            {
                "training": {
                    "microbatches": microbatches,
                    **({"grad_clip": _NEVER_CLIPS} if overlap else {}),
                },
                "pipeline": {
                    "recompute": "full" if recompute else "none",
                    "overlap_steps": overlap,
                },
                "emulation": {**dataclasses.asdict(costs), **(emulation or {})},
            }
        ),
        num_layers=layers,
    )
    plan = Plan(
        plan_id=1,
        layer_names=tuple(f"layers.{index}" for index in range(layers)),
        boundaries=edges,
        placement=kind,
        schedule=schedule or "auto",
        pipeline_size=ranks,
        data_size=1,
        num_microbatches=microbatches,
        num_groups=2,
    )
    layer_costs: LayerCosts = emulated_costs(job, num_layers=layers)
    table = layer_costs.table(edges, placement=placement)
    if recompute and not prepare_apart:
        later_s = zip(table.input_s, table.prepare_s, strict=True)
        table = dataclasses.replace(table, input_s=tuple(map(sum, later_s)), prepare_s=())
    directions = plan.directions(0)
    if schedule is not None:
        order = build(schedule, placement=placement, directions=directions)
    else:
        cap = None if most_in_flight is None else int(most_in_flight * stages / ranks)
        order = search(
            placement,
            directions=directions,
            costs=with_hop(table, hop_s),
            memory_cap=cap,
            memory=memory,
            overlap=overlap,
            seed=_SEED,
        ).schedule
    return Rehearsal(job=job, plan=plan, schedule=order, costs=table, overlaps=overlap)


def load(group: RehearsalGroup, name: str, rehearsal: Rehearsal) -> None:
    """Load a rehearsal into a group of processes.

    Args:
        group: of as many ranks.
        name: by which the group finds it.
        rehearsal: what to load.
    """
    group.load(name, job=rehearsal.job, plan=rehearsal.plan, schedules=(rehearsal.schedule,))


def hop_of(rehearsed: Rehearsed, rehearsal: Rehearsal) -> float:
    """Median seconds from the end of the work that makes a tensor to its arrival elsewhere.

    Args:
        rehearsed: a run.
        rehearsal: of this plan.
    """
    made_at: dict[tuple[int, bool, int | None], int] = {}
    for rank in rehearsed.ranks:
        for span in rank.spans:
            if span.action.op in (Op.F, Op.I, Op.B):
                key = (span.action.stage, span.action.op is Op.F, span.action.microbatch)
                made_at[key] = span.end_ns
    hops_ns = []
    for rank in rehearsed.ranks:
        for span in rank.spans:
            action = span.action
            if action.op in RECEIVE_OPS and span.end_ns - span.start_ns > _SHORTEST_WAIT_NS:
                forward = action.op is Op.RECV_F
                maker = action.stage - 1 if forward else action.stage + 1
                hops_ns.append(span.end_ns - made_at[maker, forward, action.microbatch])
    assert hops_ns, f"nobody waited for a message in {rehearsal.schedule.name}"
    return statistics.median(hops_ns) * 1e-9


def run_in_turns(
    groups: Mapping[str, RehearsalGroup],
    *,
    rounds: int,
    steps: int,
    overlapping: Collection[str] = (),
) -> dict[str, list[float]]:
    """Step times of all contenders, each of which runs a few steps in every round.

    The first step of a turn does not count: caches are cold. Of contenders whose steps overlap the last
    does not either: no step follows it. A round goes back where the one before went forth, so that a
    steady drift of the machine hits all alike.

    Args:
        groups: the group that holds each contender, by the contender's name.
        rounds: turns of each.
        steps: of a turn that count.
        overlapping: contenders whose steps overlap.
    """
    measured: dict[str, list[float]] = {name: [] for name in groups}
    for number in range(rounds):
        for name in list(groups) if number % 2 == 0 else reversed(list(groups)):
            more = 1 + (name in overlapping)
            taken_s = groups[name].run(name, num_steps=more + steps).step_s
            measured[name] += taken_s[1 : 1 + steps]
    return measured
