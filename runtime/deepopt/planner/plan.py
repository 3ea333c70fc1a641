"""The plan: which rank holds which layers, and in which order it works. Pure data.

Ranks of the whole job: `rank = data_index * pipeline_size + pipeline_rank`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepopt.errors import PlanError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A complete answer to "who does what".

    Args:
        plan_id: +1 with each plan of a job.
        layer_names: all layers in chain order.
        boundaries: index of the first layer of each stage; starts with 0, strictly ascending.
        placement: line, v or mirror.
        schedule: name of a builder in `schedule.builders`, or `searched` where `orders` is set.
        pipeline_size: ranks of one pipeline replica.
        data_size: number of replicas.
        num_microbatches: micro-batches of one step, over all replicas.
        num_groups: gradient groups of one step, over all replicas.
        orders: for each replica, the key of its searched order (see `planner.orders`); empty
            where a builder makes it.
        order: the pipeline rank at each position of the placement; empty where it is the position.
        recompute: layers that are run again for their backward; None where pipeline.recompute says
            so of all.
    """

    plan_id: int
    layer_names: tuple[str, ...]
    boundaries: tuple[int, ...]
    placement: PlacementKind
    schedule: str
    pipeline_size: int
    data_size: int
    num_microbatches: int
    num_groups: int
    orders: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    recompute: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        edges = (*self.boundaries, len(self.layer_names))
        if (
            not self.boundaries
            or edges[0] != 0
            or any(a >= b for a, b in itertools.pairwise(edges))
        ):
            raise PlanError(
                f"stage boundaries {list(self.boundaries)} do not cut "
                f"{len(self.layer_names)} layers into non-empty stages",
                remedy="start with 0, ascend strictly, and stay below the number of layers",
            )
        if len(self.orders) not in (0, self.data_size):
            raise PlanError(
                f"the plan names {len(self.orders)} searched orders for {self.data_size} replicas"
            )
        if self.order and sorted(self.order) != [*range(self.pipeline_size)]:
            raise PlanError(
                f"the plan orders ranks {list(self.order)}, a pipeline has {self.pipeline_size}",
                remedy="name each rank of a pipeline once, or none",
            )
        if any(not 0 <= layer < len(self.layer_names) for layer in self.recompute or ()):
            raise PlanError(
                f"the plan recomputes layers {list(self.recompute or ())} of "
                f"{len(self.layer_names)}",
                remedy="name layers of the model",
            )
        copies = 2 if self.placement is PlacementKind.MIRROR and self.pipeline_size > 1 else 1
        if self.num_groups % (copies * self.data_size):
            raise PlanError(
                f"{self.num_groups} gradient groups cannot be shared by {self.data_size} "
                f"replica(s) of {copies} direction(s)",
                remedy=f"set training.groups to a multiple of {copies * self.data_size} "
                "(fixed at the first launch), or choose another placement or parallel.data",
            )

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.boundaries)

    @property
    def world_size(self) -> int:
        """Workers of the whole job."""
        return self.pipeline_size * self.data_size

    def stage_layers(self, stage: int) -> range:
        """Indices of the layers of a stage."""
        edges = (*self.boundaries, len(self.layer_names))
        return range(edges[stage], edges[stage + 1])

    def make_placement(self) -> Placement:
        """Stages on pipeline ranks.

        Raises:
            PlanError: the number of stages does not fit the placement.
        """
        per_rank = max(1, self.num_stages // self.pipeline_size)
        placement = place(
            self.placement, num_ranks=self.pipeline_size, stages_per_rank=per_rank
        )
        if placement.num_stages != self.num_stages:
            raise PlanError(
                f"placement {self.placement} on {self.pipeline_size} ranks has "
                f"{placement.num_stages} stages, the plan cuts {self.num_stages}"
            )
        return placement.on_ranks(self.order) if self.order else placement

    def recomputed(self, layers: Sequence[int], *, all_of_them: bool) -> frozenset[int]:
        """Which of some layers are run again for their backward.

        Args:
            layers: indices.
            all_of_them: what pipeline.recompute says where the plan does not.
        """
        if self.recompute is None:
            return frozenset(layers if all_of_them else ())
        return frozenset(layers) & frozenset(self.recompute)

    def costs_of(self, layers: LayerCosts) -> LayerCosts:
        """The same costs with only those layers run again that this plan says.

        Args:
            layers: costs of all layers of the model.
        """
        return layers if self.recompute is None else layers.recomputing(self.recompute)

    def stage_costs(self, layers: LayerCosts) -> CostTable:
        """The costs of this plan's stages, for the simulator.

        Args:
            layers: costs of all layers of the model, with as many ranks as a pipeline has.

        Raises:
            PlanError: they are of another model or of other ranks.
        """
        return layers.table(
            self.boundaries, placement=self.make_placement(), num_replicas=self.data_size
        )

    def replica_groups(self, data_index: int) -> tuple[tuple[int, int], ...]:
        """Global micro-batch ranges of the groups that one replica owns."""
        bounds = group_bounds(self.num_microbatches, self.num_groups)
        per_replica = self.num_groups // self.data_size
        return bounds[data_index * per_replica : (data_index + 1) * per_replica]

    def directions(self, data_index: int) -> tuple[Direction, ...]:
        """The direction of each micro-batch of one replica."""
        sizes = [end - start for start, end in self.replica_groups(data_index)]
        return directions_of(sizes, num_directions=self.make_placement().num_directions)

    def group_owners(self, stage: int) -> tuple[int, ...]:
        """The world rank whose copy of a stage owns each gradient group, by group."""
        placement = self.make_placement()
        per_replica = self.num_groups // self.data_size
        num_down = per_replica // placement.num_directions
        owners = []
        for group in range(self.num_groups):
            replica, local = divmod(group, per_replica)
            direction = Direction.DOWN if local < num_down else Direction.UP
            owners.append(replica * self.pipeline_size + placement.rank_of(stage, direction))
        return tuple(owners)

    def holders(self, stage: int) -> tuple[int, ...]:
        """The world ranks that hold a copy of a stage, in the order of their first group."""
        return tuple(dict.fromkeys(self.group_owners(stage)))

    def held_stages(self, rank: int) -> tuple[int, ...]:
        """The stages a world rank holds, ascending."""
        return self.make_placement().stages_of(rank % self.pipeline_size)

    def fingerprint(self) -> str:
        """Hash of everything but `plan_id`."""
        fields = self.to_json()
        del fields["plan_id"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """From what `to_json` gave."""
        return cls(
            **{
                **fields,
                "layer_names": tuple(fields["layer_names"]),
                "boundaries": tuple(fields["boundaries"]),
                "orders": tuple(fields.get("orders", ())),  # older plans know none
                "order": tuple(fields.get("order", ())),
                "recompute": None
                if fields.get("recompute") is None
                else tuple(fields["recompute"]),
                "placement": PlacementKind(fields["placement"]),
            }
        )
