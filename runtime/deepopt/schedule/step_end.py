"""How long a step takes once its actions are placed: exchanges and updates at its end, or its distance
to the next step.

For searches, on coded orders; the same figures as the simulator's. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add
from typing import NamedTuple

from deepopt.schedule.coding import CodedProblem

_NEVER = float("-inf")


class EndTails(NamedTuple):
    """How much of a step follows actions through its end alone.

    Args:
        of_rank: after the last action of each rank.
        of_code: after the last gradients of stages whose update waits for an exchange, by code.
    """

    of_rank: list[float]
    of_code: dict[int, float]


class StepEnd:
    """The end of the steps of a problem.

    Args:
        problem: whose costs say what exchanges and updates take.
        overlap: whether each rank begins the next step when it has ended this one: then a step is
            as long as the longest of its ranks, whenever that began.

    Attributes:
        least_s: what the rank with the most work has to do; no step takes less.
    """

    def __init__(self, problem: CodedProblem, *, overlap: bool = False) -> None:
        costs, placement = problem.costs, problem.placement
        zeros = (0.0,) * placement.num_stages
        reduce_s, update_s = costs.reduce_s or zeros, costs.update_s or zeros
        factors = costs.rank_factor or (1.0,) * placement.num_ranks
        self._duration = problem.duration
        self._overlap = overlap
        self._is_plain = not overlap and not any(reduce_s) and not any(update_s)
        self._reduce_s = reduce_s
        self._update_s = [
            [(stage, update_s[stage] * factor) for stage in placement.stages_of(rank)]
            for rank, factor in enumerate(factors)
        ]
        self._all_updates_s = [sum(took for _, took in own) for own in self._update_s]
        work_s = [0.0] * placement.num_ranks
        for code, rank in enumerate(problem.rank):
            work_s[rank] += problem.duration[code] if problem.is_used(code) else 0.0
        self.least_s = max(map(add, work_s, self._all_updates_s), default=0.0)
        # Gradients of a direction ascend: the last micro-batch's W completes them.
        lasts = {direction: index for index, direction in enumerate(problem.directions)}
        self._last_gradients = [
            [problem.weight_code(stage, microbatch) for microbatch in lasts.values()]
            for stage in range(placement.num_stages)
        ]

    def seconds(self, rows: Sequence[Sequence[int]], ends: Sequence[float]) -> float:
        """The step time.

        Args:
            rows: codes per rank.
            ends: of these rows, by code.
        """
        if self._is_plain:
            return max(ends)
        return max((s for s, _ in self._by_rank(rows, ends)), default=0.0)

    def critical(self, rows: Sequence[Sequence[int]], ends: Sequence[float]) -> int:
        """The action whose end decides the step time.

        Args:
            rows: codes per rank.
            ends: of these rows, by code.
        """
        if self._is_plain:
            return max((row[-1] for row in rows if row), key=lambda last: ends[last])
        return max(self._by_rank(rows, ends), key=lambda entry: entry[0])[1]

    def tails(self, rows: Sequence[Sequence[int]], ends: Sequence[float]) -> EndTails:
        """What follows the last actions: of an exchange, with the update of its own stage alone.

        Args:
            rows: codes per rank.
            ends: of these rows, by code.
        """
        of_rank = [0.0] * len(rows)
        if self._is_plain:
            return EndTails(of_rank, {})
        of_code: dict[int, float] = {}
        for rank, row in enumerate(rows):
            start = self._start(row, ends)
            of_rank[rank] = self._all_updates_s[rank] - start
            for stage, update_s in self._update_s[rank]:
                if self._reduce_s[stage]:
                    tail = self._reduce_s[stage] + update_s - start
                    for code in self._last_gradients[stage]:
                        of_code[code] = max(tail, of_code.get(code, _NEVER))
        return EndTails(of_rank, of_code)

    def _start(self, row: Sequence[int], ends: Sequence[float]) -> float:
        return ends[row[0]] - self._duration[row[0]] if self._overlap and row else 0.0

    def _by_rank(
        self, rows: Sequence[Sequence[int]], ends: Sequence[float]
    ) -> list[tuple[float, int]]:
        """Of each rank with work: how long its step takes, and the action that decides it."""
        found = []
        whole = [max(codes, key=ends.__getitem__) for codes in self._last_gradients]
        for row, updates in zip(rows, self._update_s, strict=True):
            if not row:
                continue
            code = row[-1]
            free = ends[code]
            summed = sorted(
                (ends[whole[stage]] + self._reduce_s[stage], stage, took)
                for stage, took in updates
            )
            for summed_at, stage, took in summed:
                if summed_at > free:
                    free, code = summed_at, whole[stage]
                free += took
            found.append((free - self._start(row, ends), code))
        return found
