"""The schedule's words: operations, actions, placements, schedules.

A schedule holds, for each pipeline rank, an ordered list of compute actions. Sends and receives
are added by `lowering.lower`. An action prints and parses: `str(Action(2, Op.F, 5)) == "2F5"`.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepopt.errors import ScheduleError


class Op(enum.StrEnum):
    """One kind of work on one micro-batch of one stage."""

    F = "F"  # forward
    I = "I"  # gradient of the stage input  # noqa: E741 - the field's own letter
    W = "W"  # gradient of the weights
    B = "B"  # I and W together
    R = "R"  # prepare a backward: recompute what the forward did not keep
    SEND_F = "SEND_F"  # output of the stage to the next stage
    RECV_F = "RECV_F"  # input of the stage from the one before
    SEND_B = "SEND_B"  # gradient of the input to the stage before
    RECV_B = "RECV_B"  # gradient of the output from the next stage
    REDUCE = "REDUCE"  # sum the stage's gradients over its copies and data-parallel replicas


COMPUTE_OPS = frozenset({Op.F, Op.I, Op.W, Op.B, Op.R})
RECEIVE_OPS = frozenset({Op.RECV_F, Op.RECV_B})
SEND_OPS = frozenset({Op.SEND_F, Op.SEND_B})


@dataclass(frozen=True, slots=True)
class Action:
    """One operation of one stage on one micro-batch.

    Args:
        stage: global stage index.
        op: the operation.
        microbatch: index of the micro-batch within the replica; None for REDUCE alone.
    """

    stage: int
    op: Op
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{'' if self.microbatch is None else self.microbatch}"


_ACTION = re.compile(
    r"([0-9]{1,9})(SEND_F|RECV_F|SEND_B|RECV_B|REDUCE|F|I|W|B|R)([0-9]{1,9})?", re.ASCII
)


def parse_action(text: str) -> Action:
    """Read an action from its printed form.

    Args:
        text: for example `2F5`, `0SEND_B3`, `1REDUCE`.

    Raises:
        ScheduleError: the text is not an action.
    """
    match = _ACTION.fullmatch(text.strip())
    if match is None or (match[3] is None) != (match[2] == Op.REDUCE):
        raise ScheduleError(
            f"{text!r} is not an action",
            remedy="write STAGE OP MICROBATCH without spaces: 2F5, 0SEND_B3 or 1REDUCE",
        )
    return Action(int(match[1]), Op(match[2]), None if match[3] is None else int(match[3]))


class Direction(enum.StrEnum):
    """Which way a micro-batch goes through the ranks."""

    DOWN = "down"  # stage 0 on the first rank
    UP = "up"  # stage 0 on the last rank


class PlacementKind(enum.StrEnum):
    """How stages lie on ranks."""

    LINE = "line"  # rank r holds stages r, r + P, ...: one copy, one direction
    V = "v"  # 2P stages folded once: rank r holds r and 2P-1-r: one copy, one direction
    MIRROR = "mirror"  # P stages twice: rank r holds r (down) and P-1-r (up): two copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Which rank holds which stage, for each direction.

    Args:
        kind: line, v or mirror.
        num_stages: number of stages.
        num_ranks: number of pipeline ranks.
        down: down[stage] is the rank for micro-batches that go down.
        up: up[stage] is the rank for micro-batches that go up; None when there is one
            direction.
    """

    kind: PlacementKind
    num_stages: int
    num_ranks: int
    down: tuple[int, ...]
    up: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for ranks in (self.down, *(() if self.up is None else (self.up,))):
            if len(ranks) != self.num_stages or not all(0 <= r < self.num_ranks for r in ranks):
                raise ScheduleError(
                    f"placement {ranks} does not map {self.num_stages} stages "
                    f"onto {self.num_ranks} ranks"
                )

    def rank_of(self, stage: int, direction: Direction) -> int:
        """The rank that runs a stage for micro-batches of one direction."""
        if direction is Direction.DOWN or self.up is None:
            return self.down[stage]
        return self.up[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages a rank holds, ascending, each once."""
        held = {s for s in range(self.num_stages) if rank in self.copies_of(s)}
        return tuple(sorted(held))

    def copies_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of a stage: the one for `down` first, each once."""
        if self.up is None or self.up[stage] == self.down[stage]:
            return (self.down[stage],)
        return (self.down[stage], self.up[stage])

    def on_ranks(self, order: Sequence[int]) -> Placement:
        """The same stages with other ranks in its places.

        Args:
            order: the rank at each position.
        """
        return replace(
            self,
            down=tuple(order[rank] for rank in self.down),
            up=None if self.up is None else tuple(order[rank] for rank in self.up),
        )

    @property
    def num_directions(self) -> int:
        """1, or 2 with mirror placement: streams that need groups of their own."""
        return 1 if self.up is None else 2


def place(kind: PlacementKind, *, num_ranks: int, stages_per_rank: int = 1) -> Placement:
    """The placement of a kind on a number of ranks.

    Args:
        kind: line, v or mirror.
        num_ranks: pipeline ranks, at least 1.
        stages_per_rank: line only; more than 1 means interleaved stages.
    """
    ranks = tuple(range(num_ranks))
    if kind is PlacementKind.MIRROR:
        return Placement(
            kind=kind, num_stages=num_ranks, num_ranks=num_ranks, down=ranks, up=ranks[::-1]
        )
    if kind is PlacementKind.V:
        down = (*ranks, *ranks[::-1])
        return Placement(kind=kind, num_stages=2 * num_ranks, num_ranks=num_ranks, down=down)
    down = ranks * stages_per_rank
    return Placement(kind=kind, num_stages=len(down), num_ranks=num_ranks, down=down)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The order of work of one pipeline replica in one step.

    Args:
        name: builder that made it, for example `1f1b`.
        placement: stages on ranks.
        directions: directions[microbatch]; its length is the number of micro-batches.
        actions: actions[rank] in order.
    """

    name: str
    placement: Placement
    directions: tuple[Direction, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of this replica in one step."""
        return len(self.directions)

    def on_ranks(self, order: Sequence[int]) -> Schedule:
        """The same order of work with other ranks in its places.

        Args:
            order: the rank at each position.
        """
        rows: list[tuple[Action, ...]] = [()] * len(self.actions)
        for position, rank in enumerate(order):
            rows[rank] = self.actions[position]
        return replace(self, placement=self.placement.on_ranks(order), actions=tuple(rows))

    def rank_of(self, action: Action) -> int:
        """The rank that an action with a micro-batch belongs to."""
        assert action.microbatch is not None, f"{action} belongs to every copy of its stage"
        return self.placement.rank_of(action.stage, self.directions[action.microbatch])

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.actions)


def group_bounds(num_microbatches: int, num_groups: int) -> tuple[tuple[int, int], ...]:
    """Micro-batch range of each group: half-open, contiguous, sizes differ by at most one.

    Args:
        num_microbatches: micro-batches of one step, over all replicas.
        num_groups: groups whose gradients are summed apart; 1 to num_microbatches.

    Raises:
        ScheduleError: the numbers do not fit.
    """
    if not 1 <= num_groups <= num_microbatches:
        raise ScheduleError(
            f"{num_microbatches} micro-batches cannot form {num_groups} groups",
            remedy="set training.groups between 1 and training.microbatches",
        )
    edges = [g * num_microbatches // num_groups for g in range(num_groups + 1)]
    return tuple(itertools.pairwise(edges))


def directions_of(group_sizes: Sequence[int], *, num_directions: int) -> tuple[Direction, ...]:
    """The direction of each micro-batch of a replica: whole groups, the first half goes down.

    Args:
        group_sizes: micro-batches of each group of this replica, in order.
        num_directions: 1 or 2.

    Raises:
        ScheduleError: two directions do not share the groups evenly.
    """
    if num_directions == 1:
        return (Direction.DOWN,) * sum(group_sizes)
    if len(group_sizes) % 2:
        raise ScheduleError(
            f"{len(group_sizes)} groups cannot be shared by two directions",
            remedy="set training.groups to a multiple of 2 x parallel.data, "
            "or use placement line",
        )
    half = len(group_sizes) // 2
    return (Direction.DOWN,) * sum(group_sizes[:half]) + (Direction.UP,) * sum(
        group_sizes[half:]
    )
