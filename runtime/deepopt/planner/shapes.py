"""Placements to look at, the cut that fits each, and the memory that its ranks have. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError
from deepopt.planner.layer_costs import LayerCosts
from deepopt.schedule.ir import Placement, PlacementKind, place
from deepopt.schedule.memory import Memory

MOST_STAGES_PER_RANK = 4  # more stages make smaller bubbles than their messages are worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A placement to look at.

    Args:
        kind: line, v or mirror.
        stages_per_rank: stages of which a rank runs each micro-batch: 1 to 4 with line, 2 with v.
    """

    kind: PlacementKind
    stages_per_rank: int = 1

    def __str__(self) -> str:
        many = self.kind is PlacementKind.LINE and self.stages_per_rank > 1
        return f"{self.kind} x{self.stages_per_rank}" if many else str(self.kind)

    def place(self, num_ranks: int) -> Placement:
        """Its stages on ranks.

        Args:
            num_ranks: of one pipeline.
        """
        return place(self.kind, num_ranks=num_ranks, stages_per_rank=self.stages_per_rank)


def shapes(most_stages_per_rank: int = MOST_STAGES_PER_RANK) -> tuple[Shape, ...]:
    """Line with 1, 2, ... stages a rank, v and mirror.

    Args:
        most_stages_per_rank: of placement line.
    """
    return (
        *(
            Shape(kind=PlacementKind.LINE, stages_per_rank=count)
            for count in range(1, most_stages_per_rank + 1)
        ),
        Shape(kind=PlacementKind.V, stages_per_rank=2),
        Shape(kind=PlacementKind.MIRROR),
    )


SHAPES = shapes()


def check_layers(costs: LayerCosts, shape: Shape, *, num_ranks: int) -> None:
    """Check that the layers and figures suffice for the stages and ranks.

    Args:
        costs: of the layers and ranks.
        shape: the placement.
        num_ranks: of one pipeline.

    Raises:
        PlanError: more stages than layers, or figures of other ranks.
    """
    num_stages = shape.place(num_ranks).num_stages
    if num_stages > costs.num_layers:
        per_rank = shape.stages_per_rank
        stages = f"{num_stages} stages" + (f" ({per_rank} a rank)" if per_rank > 1 else "")
        raise PlanError(
            f"{stages} need at least {num_stages} layers, the model has {costs.num_layers}",
            remedy=f"use at most {costs.num_layers // per_rank or 1} worker(s) per pipeline, "
            "more replicas (parallel.data), or a deeper model",
        )
    for what, figures in (
        ("rank factors", costs.rank_factor),
        ("memories of ranks", costs.memory_bytes),
    ):
        if len(figures) not in (0, num_ranks):
            raise PlanError(
                f"the costs name {len(figures)} {what}, a pipeline has {num_ranks} ranks",
                remedy="give one for each rank, or none",
            )


def memory_for(costs: LayerCosts, *, boundaries: Sequence[int], placement: Placement) -> Memory:
    """What micro-batches hold and ranks can hold, in bytes where both are known.

    Where they are not, a rank may hold as many micro-batches as 1F1B does (p; p + 1 with mirror, whose
    two streams meet), each counted in shares of the rank.

    Args:
        costs: of the layers and ranks.
        boundaries: index of the first layer of each stage.
        placement: stages on ranks.

    Raises:
        PlanError: the layers' states alone do not fit.
    """
    if not costs.knows_memory:
        lanes = placement.num_stages // placement.num_ranks
        both = placement.kind is PlacementKind.MIRROR
        return Memory.counted(placement, cap=placement.num_ranks * lanes + both)
    states = costs.rank_state_bytes(boundaries, placement=placement)
    caps = [size - state for size, state in zip(costs.memory_bytes, states, strict=True)]
    for rank, cap in enumerate(caps):
        if cap <= 0:
            raise PlanError(
                f"rank {rank} has {costs.memory_bytes[rank] / 1e9:.1f} GB, its layers' states "
                f"take {states[rank] / 1e9:.1f} GB",
                remedy="use more ranks or a placement with one copy",
            )
    return sizes_of(costs, boundaries=boundaries, caps=caps)


def sizes_of(costs: LayerCosts, *, boundaries: Sequence[int], caps: Sequence[float]) -> Memory:
    """What micro-batches hold in bytes, within given capacities.

    Args:
        costs: of the layers.
        boundaries: index of the first layer of each stage.
        caps: of each rank, without the layers' states.
    """
    full = costs.per_stage(costs.activation_bytes, boundaries)
    kept = tuple(map(min, costs.per_stage(costs.kept_bytes, boundaries), full))
    return Memory(kept=kept, full=full, caps=tuple(caps))
