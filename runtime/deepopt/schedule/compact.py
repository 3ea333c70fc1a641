"""Orders of millions of actions: a number for each action, an array for each rank.

An `Action` takes some 150 bytes; p = 1024 ranks with m = 4096 micro-batches run 8 to 25 million.
So rows are arrays of codes, (stage x micro-batches + micro-batch) x 8 + op, and patterns are
appended by slices. It says the same as a `Schedule`, to which it can be turned and back; it knows
no particular order (`builders`) and no time (`simulate`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from deepopt.schedule.ir import Action, Direction, Op, Placement, Schedule

OPS = (Op.F, Op.I, Op.B, Op.W, Op.R)
"""The op of a code is its lowest three bits: the position here."""

CODE_OF_OP = {op: index for index, op in enumerate(OPS)}
OP_BITS = 3
OP_MASK = (1 << OP_BITS) - 1

Row: TypeAlias = "array[int]"
"""The actions of one rank, by their codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactSchedule:
    """A `Schedule` in a few bytes an action.

    Args:
        name: builder that made it.
        placement: stages on ranks.
        directions: directions[microbatch].
        rows: rows[rank] in order, codes.
    """

    name: str
    placement: Placement
    directions: tuple[Direction, ...]
    rows: tuple[Row, ...]

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of this replica in one step."""
        return len(self.directions)

    @property
    def num_actions(self) -> int:
        """Over all ranks."""
        return sum(map(len, self.rows))

    def action(self, code: int) -> Action:
        """What a code stands for.

        Args:
            code: of a row.
        """
        stage, microbatch = divmod(code >> OP_BITS, len(self.directions))
        return Action(stage, OPS[code & OP_MASK], microbatch)


class RowWriter:
    """Appends a rank's actions; micro-batches count up for each stage and op, from 0 on.

    Args:
        num_microbatches: of the step.
    """

    def __init__(self, *, num_microbatches: int) -> None:
        # 4 bytes a code hold 2**31 codes: 2048 stages x 131,072 micro-batches.
        self.row: Row = array("i")
        self._num_microbatches = num_microbatches
        self._next: Counter[tuple[int, Op]] = Counter()

    def add(self, *steps: tuple[int, Op], times: int = 1) -> None:
        """Append a pattern so many times; each occurrence is of the next micro-batch.

        Args:
            steps: (stage, op) of each action of the pattern.
            times: how often.
        """
        if times < 1 or not steps:
            return
        start, period = len(self.row), len(steps)
        self.row.extend(array("i", bytes(4 * period * times)))
        strides = Counter(step for step in steps)
        offsets: Counter[tuple[int, Op]] = Counter()
        for slot, step in enumerate(steps):
            stage, op = step
            parts = (Op.I, Op.W) if op is Op.B else (op,)
            first = self._next[stage, parts[0]] + offsets[step]
            base = ((stage * self._num_microbatches + first) << OP_BITS) | CODE_OF_OP[op]
            stride = strides[step] << OP_BITS
            self.row[start + slot :: period] = array(
                "i", range(base, base + times * stride, stride)
            )
            offsets[step] += 1
        for (stage, op), count in strides.items():
            for part in (Op.I, Op.W) if op is Op.B else (op,):
                self._next[stage, part] += count * times

    def done(self, stage: int, op: Op) -> int:
        """Micro-batches of a stage whose op was appended.

        Args:
            stage: global stage index.
            op: F, I, W or R; a B counts as I and W.
        """
        return self._next[stage, op]


def compact(schedule: Schedule) -> CompactSchedule:
    """The same order in codes.

    Args:
        schedule: compute actions per rank.
    """
    return CompactSchedule(
        name=schedule.name,
        placement=schedule.placement,
        directions=schedule.directions,
        rows=compact_rows(schedule.actions, num_microbatches=schedule.num_microbatches),
    )


def compact_rows(
    order: Iterable[Iterable[Action]], *, num_microbatches: int
) -> tuple[Row, ...]:
    """Actions per rank as codes per rank.

    Args:
        order: compute actions per rank.
        num_microbatches: of the step.
    """
    return tuple(array("i", _codes(row, num_microbatches)) for row in order)


def expand(schedule: CompactSchedule) -> Schedule:
    """The same order in actions.

    Args:
        schedule: in codes.
    """
    return Schedule(
        name=schedule.name,
        placement=schedule.placement,
        directions=schedule.directions,
        actions=tuple(tuple(map(schedule.action, row)) for row in schedule.rows),
    )


def keep_microbatches(rows: Iterable[Row], *, made_for: int, keep: int) -> tuple[Row, ...]:
    """Leave out the micro-batches that are not there: what stays is still in order.

    Args:
        rows: codes of an order of `made_for` micro-batches.
        made_for: micro-batches of these codes, at least `keep`.
        keep: micro-batches from 0 on that stay; the new codes are made for so many.
    """
    if made_for == keep:
        return tuple(rows)
    kept = []
    for row in rows:
        parts = ((divmod(code >> OP_BITS, made_for), code & OP_MASK) for code in row)
        kept.append(
            array(
                "i",
                (
                    ((stage * keep + microbatch) << OP_BITS) | op
                    for (stage, microbatch), op in parts
                    if microbatch < keep
                ),
            )
        )
    return tuple(kept)


def _codes(row: Iterable[Action], num_microbatches: int) -> Iterable[int]:
    code_of_op: Callable[[Op], int] = CODE_OF_OP.__getitem__
    for action in row:
        microbatch = action.microbatch
        assert microbatch is not None, f"{action} is no compute action"
        unit = action.stage * num_microbatches + microbatch
        yield (unit << OP_BITS) | code_of_op(action.op)
