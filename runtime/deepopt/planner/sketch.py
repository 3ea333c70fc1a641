"""A pipeline that is only thought of: its sizes, and costs from a few figures.

Pure. Activations and caps are counted in micro-batches of a rank's whole share of the layers, so that
placements with one, two or four stages a rank can be compared: 1F1B holds as many as there are ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError
from deepopt.planner.choose import Shape, fit_boundaries
from deepopt.planner.layer_costs import LayerCosts
from deepopt.schedule.ir import (
    Direction,
    Placement,
    PlacementKind,
    directions_of,
    group_bounds,
    place,
)
from deepopt.schedule.simulate import CostTable

_UNIT_RATE = 1e9  # bytes/s of a route on which sizes stand for times


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What orders are looked for.

    Args:
        num_ranks: ranks of one pipeline.
        num_microbatches: of one step and replica.
        layers: costs of the layers, cut into stages for each placement.
        memory_cap: most micro-batches in flight on a rank, in shares of a rank; None for any.
        num_replicas: of the pipeline; they exchange gradients.
    """

    num_ranks: int
    num_microbatches: int
    layers: LayerCosts
    memory_cap: float | None = None
    num_replicas: int = 1

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.num_microbatches < 1:
            raise PlanError(
                f"{self.num_microbatches} micro-batches on {self.num_ranks} ranks are no pipeline",
                remedy="give at least one of each",
            )
        if len(self.layers.rank_factor) not in (0, self.num_ranks):
            raise PlanError(
                f"{len(self.layers.rank_factor)} rank factors were given for "
                f"{self.num_ranks} ranks",
                remedy="give one factor for each rank",
            )

    def place(self, kind: PlacementKind, *, stages_per_rank: int = 1) -> Placement:
        """Stages on this pipeline's ranks.

        Args:
            kind: line, v or mirror.
            stages_per_rank: line only.

        Raises:
            PlanError: fewer layers than stages.
        """
        placement = place(kind, num_ranks=self.num_ranks, stages_per_rank=stages_per_rank)
        if placement.num_stages > self.layers.num_layers:
            raise PlanError(
                f"{placement.num_stages} stages need as many layers, the costs name "
                f"{self.layers.num_layers}",
                remedy="use fewer ranks or stages per rank, or a deeper model",
            )
        return placement

    def table(self, placement: Placement) -> CostTable:
        """The costs of the stages, cut so that the busiest rank has as little to do as can be.

        Args:
            placement: stages on ranks.
        """
        work = self.layers.work_s
        num_stages = placement.num_stages
        if len(set(work)) == 1 and len(work) % num_stages == 0 and not self.layers.rank_factor:
            # No search, so no rounding, where the answer is plain.
            boundaries = tuple(range(0, len(work), len(work) // num_stages))
        else:
            shape = Shape(kind=placement.kind, stages_per_rank=num_stages // self.num_ranks)
            boundaries = fit_boundaries(self.layers, shape, num_ranks=self.num_ranks)
        return self.layers.table(
            boundaries, placement=placement, num_replicas=self.num_replicas
        )

    def directions(self, placement: Placement) -> tuple[Direction, ...]:
        """Micro-batches in the directions of a placement, as a job of two groups has them."""
        if placement.num_directions == 1 or self.num_microbatches == 1:
            return (Direction.DOWN,) * self.num_microbatches
        sizes = [end - start for start, end in group_bounds(self.num_microbatches, 2)]
        return directions_of(sizes, num_directions=2)

    def stage_cap(self, placement: Placement) -> int | None:
        """The memory cap in stage micro-batches of a placement; None for no cap."""
        if self.memory_cap is None:
            return None
        return stage_cap(self.memory_cap, placement=placement)


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
