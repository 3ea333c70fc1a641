"""A pipeline that is only thought of: its sizes, and costs from a few figures.

Pure. Activations and caps are counted in micro-batches of a rank's whole share of the layers, so that
placements with one, two or four stages a rank can be compared: 1F1B holds as many as there are ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError
from deepopt.planner.cut import NO_FREEDOM, Cut, Freedom, cuts, given_cut
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.shapes import Shape, memory_for
from deepopt.schedule.ir import Direction, Placement, directions_of, group_bounds
from deepopt.schedule.memory import Memory
from deepopt.schedule.simulate import CostTable

_UNIT_RATE = 1e9  # bytes/s of a route on which sizes stand for times


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What orders are looked for.

    Args:
        num_ranks: ranks of one pipeline.
        replicas: micro-batches of each gradient group, for each replica of the pipeline; replicas
            exchange gradients.
        layers: costs of the layers, cut into stages for each placement. Where they name sizes and
            memory, orders have to fit these.
        memory_cap: else, the most micro-batches in flight on a rank, in shares of a rank; None
            for any.
        capped_as_1f1b: else, as many as 1F1B holds (p; p + 1 with mirror, whose two streams meet).
        boundaries: a cut to keep to; None to fit one to the costs.
        freedom: what else may be chosen.
        cores: host cores that all ranks share; None where each has a device of its own.
        overlap: whether each rank begins the next step when it has ended this one.
    """

    num_ranks: int
    replicas: tuple[tuple[int, ...], ...]
    layers: LayerCosts
    memory_cap: float | None = None
    capped_as_1f1b: bool = False
    boundaries: tuple[int, ...] | None = None
    freedom: Freedom = NO_FREEDOM
    cores: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or not self.replicas or not all(map(sum, self.replicas)):
            raise PlanError(
                f"{[sum(sizes) for sizes in self.replicas]} micro-batches on {self.num_ranks} "
                "ranks are no pipeline",
                remedy="give at least one of each",
            )
        if len(self.layers.rank_factor) not in (0, self.num_ranks):
            raise PlanError(
                f"{len(self.layers.rank_factor)} rank factors were given for "
                f"{self.num_ranks} ranks",
                remedy="give one factor for each rank",
            )

    @property
    def cores_of_a_replica(self) -> int | None:
        """Host cores that the ranks of one replica share."""
        return None if self.cores is None else max(1, self.cores // len(self.replicas))

    def place(self, shape: Shape) -> Placement:
        """Stages on this pipeline's ranks in their own order.

        Args:
            shape: the placement.

        Raises:
            PlanError: a given cut has another number of stages.
        """
        placement = shape.place(self.num_ranks)
        if self.boundaries is not None and len(self.boundaries) != placement.num_stages:
            raise PlanError(
                f"{placement.num_stages} stages, pipeline.boundaries cuts {len(self.boundaries)}"
            )
        return placement

    def cuts(self, shape: Shape) -> tuple[Cut, ...]:
        """Cuts to look at: the given one, or those with the least for the busiest rank to do.

        Args:
            shape: the placement.

        Raises:
            PlanError: more stages than layers, or nothing fits the memory.
        """
        most = max(map(sum, self.replicas))
        if self.boundaries is not None:
            cut = given_cut(
                self.boundaries,
                costs=self.layers,
                shape=shape,
                num_ranks=self.num_ranks,
                num_microbatches=most,
                freedom=self.freedom,
            )
            return (cut,)
        return cuts(
            self.layers,
            shape,
            num_ranks=self.num_ranks,
            num_microbatches=most,
            freedom=self.freedom,
        )

    def layers_of(self, cut: Cut) -> LayerCosts:
        """Costs of the layers in the places of a cut: position by position, with its repeats.

        Args:
            cut: of this pipeline.
        """
        layers = self.layers.recomputing(cut.again) if self.layers.recomputes else self.layers
        return layers.on_ranks(cut.order) if cut.order else layers

    def table(self, cut: Cut, *, placement: Placement) -> CostTable:
        """The costs of the stages of a cut, by position.

        Args:
            cut: of this pipeline.
            placement: stages on positions.
        """
        return self.layers_of(cut).table(
            cut.boundaries, placement=placement, num_replicas=len(self.replicas)
        )

    def memory(self, cut: Cut, *, placement: Placement) -> Memory:
        """What micro-batches hold and ranks can hold, by position.

        Args:
            cut: of this pipeline.
            placement: stages on positions.

        Raises:
            PlanError: the layers' states alone do not fit.
        """
        if self.layers.knows_memory or self.capped_as_1f1b:
            return memory_for(
                self.layers_of(cut), boundaries=cut.boundaries, placement=placement
            )
        return Memory.counted(placement, cap=self.stage_cap(placement))

    def directions(self, placement: Placement) -> tuple[tuple[Direction, ...], ...]:
        """Micro-batches of each replica in the directions of a placement.

        Args:
            placement: stages on ranks.

        Raises:
            ScheduleError: the groups cannot be shared by two directions.
        """
        return tuple(
            directions_of(
                sizes, num_directions=1 if sum(sizes) == 1 else placement.num_directions
            )
            for sizes in self.replicas
        )

    def stage_cap(self, placement: Placement) -> int | None:
        """The memory cap in stage micro-batches of a placement; None for no cap."""
        if self.memory_cap is None:
            return None
        return stage_cap(self.memory_cap, placement=placement)


def two_groups(num_microbatches: int, *, num_replicas: int = 1) -> tuple[tuple[int, ...], ...]:
    """The gradient groups of replicas, as a job that says nothing of groups has them.

    Args:
        num_microbatches: of each replica.
        num_replicas: of the pipeline.
    """
    if num_microbatches < 1:
        return ((),) * num_replicas
    bounds = group_bounds(num_microbatches, min(2, num_microbatches))
    return (tuple(end - start for start, end in bounds),) * num_replicas


def stage_cap(cap: float, *, placement: Placement) -> int:
    """How many stage micro-batches fit where so many micro-batches of a rank's share do.

    Args:
        cap: micro-batches of a rank's share of the layers.
        placement: stages on ranks.
    """
    return math.floor(cap * placement.num_stages / placement.num_ranks + 1e-9)


def layers_of_ops(
    op_times_s: Sequence[Sequence[float]],
    *,
    num_ranks: int,
    stages_per_rank: int,
    rank_factor: Sequence[float] = (),
    latency_s: float = 0.0,
    transfer_s: float = 0.0,
    update_s: float = 0.0,
    exchange_s: float = 0.0,
) -> LayerCosts:
    """Costs of layers from a few figures, for pipelines that are only thought of.

    Args:
        op_times_s: F, I, W and perhaps R of each layer; a single entry is one rank's whole share,
            which is cut into equal layers.
        num_ranks: ranks of the pipeline.
        stages_per_rank: the most that a placement will have, for the cutting of a single entry.
        rank_factor: multiplies all compute of a rank; empty for 1.
        latency_s: from the end of a transfer to its arrival.
        transfer_s: how long a tensor occupies its route.
        update_s: optimizer update of one rank's share.
        exchange_s: exchange of the gradients of one rank's share between two copies.

    Raises:
        PlanError: fewer entries than ranks, or figures that are no times.
    """
    times = [(*entry, 0.0) if len(entry) == 3 else tuple(entry) for entry in op_times_s]
    if len(times) == 1:
        per_rank = math.lcm(*range(1, max(2, stages_per_rank) + 1))
        times = [tuple(time / per_rank for time in times[0])] * (num_ranks * per_rank)
    if len(times) < num_ranks:
        raise PlanError(
            f"costs of {len(times)} layers were given for {num_ranks} ranks",
            remedy="give one F/I/W for a rank's share, or one for each layer, at least as many "
            "as ranks",
        )
    layers_a_rank = len(times) / num_ranks
    count = len(times)
    forward, inputs, weight, prepare = zip(*times, strict=True)
    return LayerCosts(
        forward_s=forward,
        input_s=inputs,
        weight_s=weight,
        prepare_s=prepare if any(prepare) else (),
        update_s=(update_s / layers_a_rank,) * count if update_s else (),
        output_bytes=(transfer_s * _UNIT_RATE,) * count if transfer_s else (),
        gradient_bytes=(exchange_s / layers_a_rank * _UNIT_RATE,) * count if exchange_s else (),
        rank_factor=tuple(rank_factor),
        latency_s=latency_s,
        bytes_per_s=_UNIT_RATE,
        source="given",
    )
