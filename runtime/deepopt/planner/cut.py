"""The cut of a chain for one placement: boundaries, devices in their places, layers that are run again. Pure.

Loads here are seconds a micro-batch of the busiest rank or route. A step takes longer: what fills and drains
the pipeline is the simulator's affair, which ranks the cuts that come from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepopt.errors import PlanError
from deepopt.planner.device_order import Arrangement, Kind, arrange, arrange_line
from deepopt.planner.interleaved import divide_interleaved
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.partition import (
    Division,
    divide_folded,
    divide_line,
    folded_bound,
    line_bound,
)
from deepopt.planner.shapes import Shape, check_layers
from deepopt.planner.stage_load import Range, StageLoads, in_flight, scaled
from deepopt.schedule.ir import PlacementKind

_STRETCHES = (1.03, 1.1)  # of the least load: evener cuts that may fill faster
_MOST_TO_STRETCH = 100  # layers: with more, the least load alone takes seconds
_SHARES = (1.0, 0.5, 0.0)  # of 1F1B's micro-batches in flight; 0 is one of each stage
_INFINITE = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Who holds what on one placement.

    Args:
        boundaries: index of the first layer of each stage.
        order: the rank at each position of the placement; empty where it is the position.
        again: the layers that are run again for their backward.
        load_s: of the busiest rank or route, seconds a micro-batch.
        bound_s: no cut of this placement loads its busiest rank less.
    """

    boundaries: tuple[int, ...]
    order: tuple[int, ...] = ()
    again: tuple[int, ...] = ()
    load_s: float
    bound_s: float

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Cut:
        """From what `dataclasses.asdict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            boundaries=tuple(map(int, fields["boundaries"])),
            order=tuple(map(int, fields["order"])),
            again=tuple(map(int, fields["again"])),
            load_s=float(fields["load_s"]),
            bound_s=float(fields["bound_s"]),
        )

    @property
    def gap(self) -> float:
        """How far the load may be from the least, as a share of the bound."""
        return self.load_s / self.bound_s - 1 if self.bound_s > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Freedom:
    """What may be chosen beside the boundaries.

    Args:
        recompute: whether each layer is run again; else all that the costs say.
        order: which device takes which place.
    """

    recompute: bool = False
    order: bool = False


NO_FREEDOM = Freedom()


def cuts(
    costs: LayerCosts,
    shape: Shape,
    *,
    num_ranks: int,
    num_microbatches: int,
    freedom: Freedom,
) -> tuple[Cut, ...]:
    """Cuts that are worth a search.

    First the one with the least load for as many micro-batches in flight as 1F1B has; others are
    evener, or for fewer in flight, which needs fewer repeats and larger bubbles.

    Args:
        costs: of the layers, links and ranks; `prepare_s` says what may be run again.
        shape: the placement.
        num_ranks: of one pipeline.
        num_microbatches: of one replica.
        freedom: what may be chosen.

    Raises:
        PlanError: more stages than layers, or nothing fits the memory: says the least that would do.
    """
    check_layers(costs, shape, num_ranks=num_ranks)
    problem = _Problem(costs, shape, num_ranks=num_ranks, freedom=freedom)
    counts = in_flight(shape, num_ranks=num_ranks, num_microbatches=num_microbatches)
    found: dict[tuple[object, ...], Cut] = {}
    for share in _SHARES:
        held = scaled(counts, share=share)
        for cut in problem.cuts(held):
            found.setdefault((cut.boundaries, cut.order, cut.again), cut)
        if not costs.knows_memory:
            break
    if not found:
        raise problem.too_small()
    return tuple(found.values())


def given_cut(
    boundaries: tuple[int, ...],
    *,
    costs: LayerCosts,
    shape: Shape,
    num_ranks: int,
    num_microbatches: int,
    freedom: Freedom,
) -> Cut:
    """The cut of a job that names its boundaries; what is run again may still be chosen.

    Args:
        boundaries: index of the first layer of each stage.
        costs: of the layers, links and ranks.
        shape: the placement.
        num_ranks: of one pipeline.
        num_microbatches: of one replica.
        freedom: what may be chosen.

    Raises:
        PlanError: the layers do not fit the memory.
    """
    problem = _Problem(costs, shape, num_ranks=num_ranks, freedom=freedom)
    counts = in_flight(shape, num_ranks=num_ranks, num_microbatches=num_microbatches)
    for share in _SHARES:
        found = problem.of_boundaries(boundaries, scaled(counts, share=share))
        if found is not None:
            return found
    raise problem.too_small()


class _Problem:
    """One placement of one chain."""

    def __init__(
        self, costs: LayerCosts, shape: Shape, *, num_ranks: int, freedom: Freedom
    ) -> None:
        self._costs = costs
        self._shape = shape
        self._num_ranks = num_ranks
        self._num_stages = shape.place(num_ranks).num_stages
        self._loads = StageLoads(costs, may_choose=freedom.recompute)
        self._sums = self._loads.work_sums
        factors = costs.rank_factor or (1.0,) * num_ranks
        memory = costs.memory_bytes or (_INFINITE,) * num_ranks
        self._devices: tuple[Kind, ...] = tuple(zip(factors, memory, strict=True))
        self._may_order = freedom.order and len(set(self._devices)) > 1
        self._crossing: tuple[float, ...] = ()
        if costs.output_bytes and costs.bytes_per_s:
            self._crossing = (
                0.0,
                *(size / costs.bytes_per_s for size in costs.output_bytes[:-1]),
            )

    def cuts(self, held: Sequence[int]) -> list[Cut]:
        """Cuts for so many micro-batches in flight on each stage; none where nothing fits."""
        plain = tuple(range(self._num_ranks))
        even = self._even(held)
        if even is not None:
            return [even]
        least = self._divide(plain, held)
        moved = self._arranged(held) if self._may_order else None
        bound = moved.division.load if moved is not None and moved.exact else None
        exact = self._shape.kind is not PlacementKind.LINE or self._shape.stages_per_rank == 1
        if least is not None and exact and not self._may_order:
            bound = least.load
        found = [] if least is None else [self._cut(least, plain, held, bound=bound)]
        if moved is not None:
            one = self._cut(moved.division, moved.order, held, bound=bound)
            if least is None or one.load_s < found[0].load_s * (1 - 1e-9):
                found.insert(0, one)
        for cut in found[:1]:
            order = cut.order or plain
            many = self._costs.num_layers > _MOST_TO_STRETCH
            for stretch in () if many else _STRETCHES:
                other = self._divide(order, held, stretch=stretch)
                if other is not None:
                    found.append(self._cut(other, order, held, bound=bound))
        return found

    def _even(self, held: Sequence[int]) -> Cut | None:
        """As many layers everywhere where that is plainly best: no search, so no rounding."""
        work, count = self._costs.work_s, self._costs.num_layers
        if len(set(work)) > 1 or len(set(self._devices)) > 1 or count % self._num_stages:
            return None
        edges = tuple(range(0, count, count // self._num_stages))
        if any(route * 2 > work[0] for route in self._crossing):
            return None  # a route may be what is busiest
        found = self.of_boundaries(edges, held)
        return None if found is None or (self._loads.may_choose and found.again) else found

    def of_boundaries(self, boundaries: tuple[int, ...], held: Sequence[int]) -> Cut | None:
        """A given cut; None where it does not fit."""
        edges = (*boundaries, self._costs.num_layers)
        loads = []
        for position, ranges in enumerate(self._ranges(edges, held)):
            load = self._rank_load(self._devices[position], ranges)
            alone = self._shape.kind is PlacementKind.MIRROR and len(ranges) == 1
            loads.append(2 * load if alone else load)
        if max(loads) == _INFINITE:
            return None
        division = Division(boundaries=boundaries, load=max(loads))
        return self._cut(division, tuple(range(self._num_ranks)), held, bound=max(loads))

    def too_small(self) -> PlanError:
        """Nothing fits: which layer does not, or the least memory with which a cut would."""
        ones = (1,) * self._num_stages
        most = max(memory for _, memory in self._devices)
        for layer in range(self._costs.num_layers):
            alone = self._loads.least_bytes(((layer, layer + 1, 1),))
            if alone > most:
                return PlanError(
                    f"layer {layer} alone takes {_gigabytes(alone)} with one micro-batch, the "
                    f"largest rank has {_gigabytes(most)}",
                    remedy=f"use ranks of at least {_gigabytes(alone)}, smaller micro-batches, or a "
                    "model with smaller layers",
                )
        needed = self._least_memory(ones)
        return PlanError(
            f"{self._costs.num_layers} layers do not fit {self._num_ranks} ranks of "
            f"{_gigabytes(min(m for _, m in self._devices))} to {_gigabytes(most)} with placement "
            f"{self._shape}: the smallest memory that would do is {_gigabytes(needed)} on each rank",
            remedy="use more memory or ranks, smaller micro-batches, pipeline.recompute auto, or a "
            "placement with one copy",
        )

    def _least_memory(self, held: Sequence[int]) -> float:
        """Bytes on each rank with which some cut fits; for interleaved stages, that is known to."""
        unit = [float(n) for n in range(self._costs.num_layers + 1)]
        small = [1e-9] * self._num_ranks

        def size(*ranges: tuple[int, int]) -> float:
            return self._loads.least_bytes(tuple((a, b, 1) for a, b in ranges))

        if self._shape.kind is PlacementKind.LINE:
            found = divide_line(
                unit, [1e-9] * self._num_stages, load=lambda _, a, b: size((a, b))
            )
            assert found is not None, "sizes are finite"
            if self._shape.stages_per_rank == 1:
                return found.load
            return divide_interleaved(
                found.boundaries,
                num_layers=self._costs.num_layers,
                num_ranks=self._num_ranks,
                load=lambda _, ranges: size(*ranges),
            ).load
        found = divide_folded(
            unit,
            small[: -(-self._num_stages // 2)],
            num_stages=self._num_stages,
            load=lambda _, a, b, c, d: (
                size((a, b)) if (a, b) == (c, d) else size((a, b), (c, d))
            ),
        )
        assert found is not None, "sizes are finite"
        return found.load

    def _divide(
        self, order: Sequence[int], held: Sequence[int], *, stretch: float = 1.0
    ) -> Division | None:
        """The cut with the least load for the rank at each position."""
        devices = [self._devices[rank] for rank in order]
        if self._shape.kind is not PlacementKind.LINE:
            return self._divide_folded(devices, held, stretch)
        by_stage = devices * self._shape.stages_per_rank

        def load(stage: int, a: int, b: int) -> float:
            factor, memory = by_stage[stage]
            share = memory / self._shape.stages_per_rank
            return factor * self._loads.need(((a, b, held[stage]),), memory=share).work_s

        factors = [factor for factor, _ in by_stage]
        found = divide_line(
            self._sums, factors, load=load, crossing=self._crossing, stretch=stretch
        )
        if self._shape.stages_per_rank == 1:
            return found
        # A rank's stages may share its memory and its time in other ways: two starts for a search.
        starts = [self._proportional(factors)]
        if found is not None:
            starts.insert(0, found.boundaries)
        divisions = [
            divide_interleaved(
                start,
                num_layers=self._costs.num_layers,
                num_ranks=self._num_ranks,
                load=lambda rank, ranges: self._rank_load(
                    devices[rank], _held_ranges(ranges, held[rank :: self._num_ranks])
                ),
            )
            for start in dict.fromkeys(starts)
        ]
        best = min(divisions, key=lambda division: division.load)
        return best if best.load < _INFINITE else None

    def _proportional(self, factors: Sequence[float]) -> tuple[int, ...]:
        """Stages with work in proportion to the speed of their devices, as nearly as layers allow."""
        sums, speed = self._sums, [1 / factor for factor in factors]
        reached, edges = 0.0, [0]
        for stage in range(1, len(factors)):
            reached += speed[stage - 1]
            wanted = sums[-1] * reached / sum(speed)
            last = self._costs.num_layers - (len(factors) - stage)
            near = range(edges[-1] + 1, last + 1)
            edges.append(min(near, key=lambda edge: abs(sums[edge] - wanted)))
        return tuple(edges)

    def _divide_folded(
        self, devices: Sequence[Kind], held: Sequence[int], stretch: float
    ) -> Division | None:
        pairs = self._paired(devices)
        last = self._num_stages - 1

        def load(pair: int, a: int, b: int, c: int, d: int) -> float:
            if a == c:  # the middle stage of an odd mirror: every micro-batch goes through it
                own = ((a, b, held[pair]),)
                return 2 * self._rank_load(pairs[pair], own)
            return self._rank_load(pairs[pair], ((a, b, held[pair]), (c, d, held[last - pair])))

        return divide_folded(
            self._sums,
            [factor for factor, _ in pairs],
            num_stages=self._num_stages,
            load=load,
            crossing=self._crossing,
            turns=self._shape.kind is PlacementKind.V,
            stretch=stretch,
        )

    def _rank_load(self, device: Kind, ranges: tuple[Range, ...]) -> float:
        factor, memory = device
        return factor * self._loads.need(ranges, memory=memory).work_s

    def _paired(self, devices: Sequence[Kind]) -> list[Kind]:
        """The slower and smaller device of each pair of stages."""
        if self._shape.kind is PlacementKind.V:
            return list(devices)
        half = -(-self._num_stages // 2)
        both = zip(devices[:half], devices[::-1][:half], strict=True)
        return [(max(a[0], b[0]), min(a[1], b[1])) for a, b in both]

    def _arranged(self, held: Sequence[int]) -> Arrangement | None:
        """Devices in better places."""
        if self._shape.kind is PlacementKind.LINE and self._shape.stages_per_rank == 1:
            found = arrange_line(
                self._sums,
                self._devices,
                load=lambda kind, at, a, b: self._rank_load(kind, ((a, b, held[at]),)),
                crossing=self._crossing,
            )
            if found is not None:
                return found
        return arrange(
            self._devices,
            num_layers=self._costs.num_layers,
            divide=lambda order: self._divide(order, held),
            ends=(0,) if self._shape.kind is PlacementKind.V else (0, self._num_ranks - 1),
            bound=self._bound(),
        )

    def _bound(self) -> float:
        """No cut and no order of the devices loads the busiest rank less."""
        factors = sorted(factor for factor, _ in self._devices)
        if self._shape.kind is PlacementKind.LINE and self._shape.stages_per_rank == 1:
            return line_bound(self._sums, factors)
        if self._shape.kind is PlacementKind.MIRROR:
            # Neighbours in speed paired; of an odd number any one may be in the middle.
            ways = [factors[1::2]]
            if len(factors) % 2:
                ways = [
                    [*(factors[:m] + factors[m + 1 :])[1::2], factors[m]]
                    for m in range(len(factors))
                ]
            return min(
                folded_bound(self._sums, way, num_stages=self._num_stages) for way in ways
            )
        speed = sum(1 / factor for factor in factors)
        layers = [b - a for a, b in itertools.pairwise(self._sums)]
        return max(self._sums[-1] / speed, max(layers) * factors[0])

    def _cut(
        self,
        division: Division,
        order: tuple[int, ...],
        held: Sequence[int],
        *,
        bound: float | None = None,
    ) -> Cut:
        """A division in full: with its repeats, and a bound in the same seconds."""
        devices = [self._devices[rank] for rank in order]
        edges = (*division.boundaries, self._costs.num_layers)
        again: set[int] = set()
        for position, ranges in enumerate(self._ranges(edges, held)):
            memory = devices[position][1]
            if self._shape.kind is PlacementKind.MIRROR:
                memory = min(memory, devices[-1 - position][1])
            again |= set(self._loads.need(ranges, memory=memory).again)
        per_rank = 2.0 if self._shape.kind is PlacementKind.MIRROR else 1.0
        if bound is None:
            bound = self._bound()
        plain = order == tuple(range(self._num_ranks))
        if not self._loads.may_choose:
            again = {i for i, time in enumerate(self._costs.prepare_s) if time}
        return Cut(
            boundaries=division.boundaries,
            order=() if plain else order,
            again=tuple(sorted(again)),
            load_s=division.load / per_rank,
            bound_s=min(bound - self._loads.uncertain_s(again, devices), division.load)
            / per_rank,
        )

    def _ranges(self, edges: Sequence[int], held: Sequence[int]) -> list[tuple[Range, ...]]:
        """The layers of each position, with their micro-batches in flight."""
        stages = [(edges[s], edges[s + 1], held[s]) for s in range(self._num_stages)]
        placement = self._shape.place(self._num_ranks)
        return [
            tuple(stages[stage] for stage in placement.stages_of(position))
            for position in range(self._num_ranks)
        ]


def _held_ranges(ranges: Sequence[tuple[int, int]], held: Sequence[int]) -> tuple[Range, ...]:
    return tuple((a, b, count) for (a, b), count in zip(ranges, held, strict=True))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
