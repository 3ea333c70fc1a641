"""What a range of layers loads a rank with: seconds a micro-batch, within the rank's memory.

Where a rank's memory does not hold the activations of its micro-batches in flight, layers are run again
(R) if they may be: those that free most for a second. Pure; which ranges there are is decided by `partition`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.shapes import Shape
from deepopt.schedule.ir import PlacementKind

_INFINITE = float("inf")

Range = tuple[int, int, int]
"""First layer, end, and micro-batches in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What ranges ask of a rank.

    Args:
        work_s: a micro-batch through all of them, on a rank of factor 1, repeats included; infinite
            where they do not fit.
        again: the layers that are run again.
    """

    work_s: float
    again: tuple[int, ...] = ()


_NO_ROOM = Need(work_s=_INFINITE)


def in_flight(shape: Shape, *, num_ranks: int, num_microbatches: int) -> tuple[int, ...]:
    """Micro-batches that each stage holds where a rank holds as many as in 1F1B, by stage.

    Args:
        shape: the placement.
        num_ranks: of one pipeline.
        num_microbatches: of one replica.
    """
    num_stages = shape.place(num_ranks).num_stages
    per_rank = num_stages // num_ranks
    most = num_microbatches
    if shape.kind is PlacementKind.MIRROR and num_ranks > 1:
        most = -(-num_microbatches // 2)
    return tuple(
        max(1, min(most, -(-(num_stages - stage) // per_rank))) for stage in range(num_stages)
    )


class StageLoads:
    """Loads of ranges of layers; remembers what it has computed.

    Args:
        costs: of the layers; `prepare_s` says what may be run again.
        may_choose: whether each layer may be run again or not; else all that can be are.

    Attributes:
        may_choose: the same, where there is anything to choose.
        work_sums: seconds of the first n layers, for each n, without repeats that may be chosen.
    """

    def __init__(self, costs: LayerCosts, *, may_choose: bool) -> None:
        self._costs = costs
        self.may_choose = may_choose and costs.recomputes
        plain = costs.recomputing(()) if self.may_choose else costs
        self.work_sums = _sums(plain.work_s)
        self._layers = costs.num_layers
        zeros = (0.0,) * self._layers
        self._kept = _sums(plain.kept_bytes or zeros)
        self._whole = _sums(costs.activation_bytes or zeros)
        self._states = _sums(costs.state_bytes or zeros)
        self._knows = costs.knows_memory
        # Of layers that may be chosen: seconds and bytes a micro-batch.
        self._options: dict[int, tuple[float, float]] = {}
        if self.may_choose and self._knows:
            given = costs.input_bytes or zeros
            for layer, again in enumerate(costs.prepare_s):
                saved = costs.activation_bytes[layer] - given[layer]
                if again > 0 and saved > 0:
                    self._options[layer] = again, saved
        self._seen: dict[tuple[tuple[Range, ...], float], Need] = {}

    def need(self, ranges: tuple[Range, ...], *, memory: float) -> Need:
        """What ranges ask of a rank.

        Args:
            ranges: of one rank.
            memory: bytes of the rank, for states and activations.
        """
        work = sum(self.work_sums[b] - self.work_sums[a] for a, b, _ in ranges)
        if not self._knows or memory == _INFINITE:
            return Need(work_s=work)
        lacking = self.bytes_of(ranges) - memory
        if lacking <= 0:
            return Need(work_s=work)
        if not self._options:
            return _NO_ROOM
        key = ranges, memory
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self._with_repeats(ranges, work, lacking)
        return found

    def uncertain_s(
        self, again: Collection[int], devices: Sequence[tuple[float, float]]
    ) -> float:
        """By how much a choice of repeats may be above the best one: see `_with_repeats`.

        Args:
            again: the layers that are run again.
            devices: factor and memory of each rank.
        """
        if not self.may_choose or not again or len(set(self._options.values())) <= 1:
            return 0.0
        slowest = max(factor for factor, _ in devices)
        return slowest * max(seconds for seconds, _ in self._options.values())

    def bytes_of(self, ranges: tuple[Range, ...]) -> float:
        """States and activations of a rank where nothing that may be chosen is run again.

        Args:
            ranges: of one rank.
        """
        held, at_once = 0.0, 0.0
        for a, b, count in ranges:
            kept = self._kept[b] - self._kept[a]
            held += self._states[b] - self._states[a] + count * kept
            at_once = max(at_once, self._whole[b] - self._whole[a] - kept)
        return held + at_once

    def least_bytes(self, ranges: tuple[Range, ...]) -> float:
        """The same with one micro-batch of each range in flight: no order holds less.

        Args:
            ranges: of one rank; their micro-batches do not count.
        """
        held, at_once = 0.0, 0.0
        for a, b, _ in ranges:
            whole = self._whole[b] - self._whole[a]
            saved = sum(self._options[i][1] for i in range(a, b) if i in self._options)
            kept = self._kept[b] - self._kept[a] - saved
            held += self._states[b] - self._states[a] + kept
            at_once = max(at_once, whole - kept)
        return held + at_once

    def _with_repeats(self, ranges: tuple[Range, ...], work: float, lacking: float) -> Need:
        """The cheapest layers to run again that free what is lacking.

        A knapsack: layers by what they free for a second, and for each beginning of that order the one
        layer that completes it cheapest. Where the layers are of one kind that is the optimum; else it
        is above it by less than one layer's repeat.
        """
        options = []
        for a, b, count in ranges:
            for layer in range(a, b):
                if layer in self._options:
                    seconds, saved = self._options[layer]
                    # One micro-batch is there whole while it goes back, so that one saves nothing.
                    freed = saved * (count - 1)
                    if freed > 0:
                        options.append((seconds, freed, layer))
        options.sort(key=lambda option: (option[0] / option[1], option[2]))
        best: tuple[float, tuple[int, ...]] | None = None
        seconds, freed = 0.0, 0.0
        taken: list[int] = []
        for index, (more_s, more, layer) in enumerate(options):
            completing = [o for o in options[index:] if freed + o[1] >= lacking]
            if completing:
                last = min(completing)
                if best is None or seconds + last[0] < best[0]:
                    best = seconds + last[0], (*taken, last[2])
            if freed >= lacking:
                break
            seconds, freed = seconds + more_s, freed + more
            taken.append(layer)
        if best is None:
            return _NO_ROOM
        return Need(work_s=work + best[0], again=tuple(sorted(best[1])))


def scaled(counts: Sequence[int], *, share: float) -> tuple[int, ...]:
    """Fewer micro-batches in flight, at least one of each stage.

    Args:
        counts: of each stage.
        share: of them that is left, up to 1.
    """
    return tuple(max(1, math.floor(count * share + 1e-9)) for count in counts)


def _sums(figures: Sequence[float]) -> list[float]:
    return [0.0, *itertools.accumulate(figures)]
