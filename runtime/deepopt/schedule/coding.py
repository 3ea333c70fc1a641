"""Orders as integers: durations, dependencies and memory of every action, by its code.

For searches, which evaluate thousands of orders. It sees compute and hops; routes that fill up and
updates at the end of a step are the simulator's affair, which has the last word in `search`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepopt.schedule.compact import CODE_OF_OP, OP_BITS, OP_MASK, OPS
from deepopt.schedule.ir import Action, Direction, Op, Placement, Schedule
from deepopt.schedule.list_scheduler import Order
from deepopt.schedule.memory import Memory
from deepopt.schedule.simulate import CostTable

Rows = list[list[int]]
"""Per rank, actions by their code."""

_F, _I, _W, _R = (CODE_OF_OP[op] for op in (Op.F, Op.I, Op.W, Op.R))
_NEVER = float("-inf")
_PER_UNIT = 1 << OP_BITS  # codes of one micro-batch on one stage; B and the rest are not used


class CodedProblem:
    """All actions of a step as integers, with their durations and dependencies.

    A stage has an R where R takes time, and then every micro-batch has one.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch.
        costs: seconds per op, stage and hop.
        memory: what micro-batches hold and ranks can hold.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        directions: Sequence[Direction],
        costs: CostTable,
        memory: Memory,
    ) -> None:
        self.placement = placement
        self.directions = tuple(directions)
        self.costs = costs
        self.memory = memory
        self.count = len(directions)
        self.rank: list[int] = []
        self.duration: list[float] = []
        self.needs: list[int] = []  # code of the input's maker, or -1
        self.hop: list[float] = []
        self.takes: list[float] = []  # memory from its start on
        self.frees: list[float] = []  # memory at its end
        self.has_prepare = [
            costs.duration_s(stage, op=Op.R) > 0 for stage in range(placement.num_stages)
        ]
        self.num_actions = self.count * sum(3 + has for has in self.has_prepare)
        for stage in range(placement.num_stages):
            for direction in self.directions:
                self._add(stage, direction)

        self.users: list[list[int]] = [[] for _ in self.rank]  # who needs what this code makes
        for code, maker in enumerate(self.needs):
            if maker >= 0 and self.is_used(code):
                self.users[maker].append(code)

    def is_used(self, code: int) -> bool:
        """Whether there is such an action: stages without R have none."""
        stage = (code >> OP_BITS) // self.count
        return code & OP_MASK != _R or self.has_prepare[stage]

    def _add(self, stage: int, direction: Direction) -> None:
        placement, costs = self.placement, self.costs
        rank = placement.rank_of(stage, direction)
        factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
        kept, full = self.memory.kept[stage], self.memory.full[stage]
        has_prepare = self.has_prepare[stage]
        base = len(self.rank)
        step = self.count * _PER_UNIT
        last = placement.num_stages - 1
        maker = [-1] * _PER_UNIT
        other = [stage] * _PER_UNIT
        taken = [0.0] * _PER_UNIT
        duration = [0.0] * _PER_UNIT
        for op in (_F, _I, _W, _R):
            duration[op] = costs.duration_s(stage, op=OPS[op]) * factor
        if stage:
            maker[_F], other[_F] = base - step + _F, stage - 1
        if stage < last:
            maker[_I], other[_I] = base + step + _I, stage + 1
        else:
            maker[_I] = base + _F
        maker[_R], maker[_W] = base + _F, base + _I
        taken[_F], taken[_R if has_prepare else _I] = kept, full - kept
        for op in range(_PER_UNIT):
            self.rank.append(rank)
            self.duration.append(duration[op])
            self.needs.append(maker[op])
            source = placement.rank_of(other[op], direction)
            self.hop.append(costs.hop_between(source, target=rank))
            self.takes.append(taken[op])
            self.frees.append(full if op == _W else 0.0)

    def encode(self, schedule: Schedule) -> Rows:
        """The rows of a schedule: each B as I and W, an R right before each I that lacks one.

        Args:
            schedule: of the same placement and directions.
        """
        rows = []
        prepared = {a for row in schedule.actions for a in row if a.op is Op.R}
        for actions in schedule.actions:
            row = []
            for action in actions:
                base = (action.stage * self.count + (action.microbatch or 0)) << OP_BITS
                if action.op in (Op.I, Op.B):
                    own = Action(action.stage, Op.R, action.microbatch)
                    if self.has_prepare[action.stage] and own not in prepared:
                        row.append(base + _R)
                    row.append(base + _I)
                    if action.op is Op.B:
                        row.append(base + _W)
                elif action.op is not Op.R or self.has_prepare[action.stage]:
                    row.append(base + CODE_OF_OP[action.op])
            rows.append(row)
        return rows

    def decode(self, rows: Sequence[Sequence[int]]) -> Order:
        """Actions per rank.

        Args:
            rows: codes per rank.
        """

        def action(code: int) -> Action:
            stage, microbatch = divmod(code >> OP_BITS, self.count)
            return Action(stage, OPS[code & OP_MASK], microbatch)

        return tuple(tuple(map(action, row)) for row in rows)

    def weight_code(self, stage: int, microbatch: int) -> int:
        """The code of a W."""
        return ((stage * self.count + microbatch) << OP_BITS) + _W

    def ends(self, rows: Sequence[Sequence[int]]) -> list[float] | None:
        """When each action ends, by its code; None when the rows deadlock.

        Args:
            rows: codes per rank.
        """
        needs, hop, duration = self.needs, self.hop, self.duration
        end = [-1.0] * len(duration)
        waiting = [-1] * len(duration)
        at = [0] * len(rows)
        free = [0.0] * len(rows)
        todo = list(range(len(rows)))
        left = self.num_actions
        while todo:
            rank = todo.pop()
            row, index, now = rows[rank], at[rank], free[rank]
            start_index = index
            while index < len(row):
                code = row[index]
                maker = needs[code]
                if maker >= 0:
                    arrival = end[maker]
                    if arrival < 0:
                        # Actions of one rank alone wait for an F, or for an I, of another rank.
                        waiting[maker] = rank
                        break
                    arrival += hop[code]
                    if arrival > now:
                        now = arrival
                now += duration[code]
                end[code] = now
                index += 1
                if waiting[code] >= 0 and waiting[code] != rank:
                    todo.append(waiting[code])
            left -= index - start_index
            at[rank], free[rank] = index, now
        return None if left else end

    def tails(
        self,
        rows: Sequence[Sequence[int]],
        ends: Sequence[float],
        *,
        after: Sequence[float],
        after_code: Mapping[int, float],
    ) -> list[float]:
        """How long the step lasts after each action ends, by its code: its longest chain of followers.

        Args:
            rows: codes per rank, that run.
            ends: of these rows, as `ends` gives them.
            after: what follows the last action of each rank.
            after_code: what follows an action apart from other actions, by its code.
        """
        needs, hop, duration = self.needs, self.hop, self.duration
        before = [-1] * len(duration)
        place = [0] * len(duration)
        for row in rows:
            last = -1
            for index, code in enumerate(row):
                before[code], place[code] = last, index
                last = code
        tail = [_NEVER] * len(duration)
        for row, rest in zip(rows, after, strict=True):
            if row:
                tail[row[-1]] = rest
        for code, rest in after_code.items():
            tail[code] = max(tail[code], rest)
        codes = [code for row in rows for code in row]
        # Followers end later, or at the same time where they take none: then they start no earlier.
        codes.sort(key=lambda code: (ends[code], ends[code] - duration[code], place[code]))
        for code in reversed(codes):
            rest = tail[code] + duration[code]
            previous, maker = before[code], needs[code]
            if previous >= 0 and rest > tail[previous]:
                tail[previous] = rest
            if maker >= 0 and rest + hop[code] > tail[maker]:
                tail[maker] = rest + hop[code]
        return tail

    def data_tail(self, code: int, tails: Sequence[float]) -> float:
        """The longest chain that follows an action through what it makes, not through its rank; minus
        infinity where nothing does."""
        tail = _NEVER
        for user in self.users[code]:
            tail = max(tail, self.hop[user] + self.duration[user] + tails[user])
        return tail

    def fits(self, row: Sequence[int], *, rank: int) -> bool:
        """Whether a rank stays within its memory.

        Args:
            row: codes of one rank.
            rank: which.
        """
        cap = self.memory.caps[rank] * (1 + 1e-9)
        if cap == float("inf"):
            return True
        held = 0.0
        takes, frees = self.takes, self.frees
        for code in row:
            held += takes[code]
            if held > cap:
                return False
            held -= frees[code]
        return True

    def may_swap(self, first: int, *, second: int) -> bool:
        """Whether two neighbours of a row are free to change places.

        Args:
            first: the code that stands before.
            second: the code right after it.
        """
        a, b = first >> OP_BITS, second >> OP_BITS
        if a == b:
            return False  # ops of one micro-batch on one stage follow each other
        count = self.count
        same_lane = (
            (first & OP_MASK) == (second & OP_MASK)
            and a // count == b // count
            and self.directions[a % count] is self.directions[b % count]
        )
        return not same_lane and self.needs[second] != first
