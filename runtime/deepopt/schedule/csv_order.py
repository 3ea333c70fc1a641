"""Orders in the CSV format of `torch.distributed.pipelining`, out and in.

One row per rank, one cell per action: `2F5`, `0I1`, `1W0`, `0B0`; an empty cell is a gap. So orders
can be compared with those of other tools. Text in, text out: no file is opened here, and torch is
not imported.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import (
    COMPUTE_OPS,
    Action,
    Direction,
    Op,
    Placement,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.lowering import lower

_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")  # torch: a forward and a backward side by side
_NOT_COMPUTE = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def to_csv(schedule: Schedule, *, transfers: bool) -> str:
    """A schedule as CSV.

    Args:
        schedule: without R, which the format does not know.
        transfers: False for torch's `compute_only`, True for its `compute_comms`.

    Raises:
        ScheduleError: the schedule has an R.
    """
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action.op is Op.R:
                raise ScheduleError(
                    f"rank {rank}: {action} has no name in torch's CSV format",
                    remedy="export a schedule without R",
                )
    rows = lower(schedule, reduce=False) if transfers else schedule.actions
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def from_csv(text: str, *, name: str) -> Schedule:
    """A schedule from CSV; the placement is inferred from who runs what.

    Gaps, transfers and sharding actions are left out; a forward and a backward side by side
    (`OVERLAP_F_B`) run one after the other. The result is not verified.

    Args:
        text: one row per rank.
        name: for the schedule.

    Raises:
        ScheduleError: a cell is not an action, or stages lie as in no placement.
    """
    rows = []
    for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        try:
            rows.append(tuple(action for cell in cells for action in _actions(cell.strip())))
        except ScheduleError as error:
            raise ScheduleError(f"row {line}: {error.message}", remedy=error.remedy) from None
    if not any(rows):
        raise ScheduleError(f"schedule {name} has no actions", remedy="give one row per rank")
    placement, directions = _infer(rows)
    return Schedule(name=name, placement=placement, directions=directions, actions=tuple(rows))


def _actions(cell: str) -> Iterator[Action]:
    overlap = _OVERLAP.fullmatch(cell)
    for part in overlap[1].split(";") if overlap else (cell,):
        if part and not _NOT_COMPUTE.fullmatch(part):
            action = parse_action(part)
            if action.op not in COMPUTE_OPS:
                raise ScheduleError(f"{part!r} is not an action of this format")
            yield action


def _infer(rows: list[tuple[Action, ...]]) -> tuple[Placement, tuple[Direction, ...]]:
    ranks: dict[tuple[int, int], int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            assert action.microbatch is not None, f"{action} is a compute action"
            ranks[action.stage, action.microbatch] = rank
    num_stages = 1 + max(stage for stage, _ in ranks)
    num_microbatches = 1 + max(microbatch for _, microbatch in ranks)
    for kind in PlacementKind:
        per_rank = max(1, num_stages // len(rows)) if kind is PlacementKind.LINE else 1
        placement = place(kind, num_ranks=len(rows), stages_per_rank=per_rank)
        if placement.num_stages != num_stages:
            continue
        directions = [
            _direction(placement, ranks, microbatch) for microbatch in range(num_microbatches)
        ]
        known = tuple(direction for direction in directions if direction is not None)
        if len(known) == num_microbatches:
            return placement, known
    homes = {
        stage: sorted({r for (s, _), r in ranks.items() if s == stage}) for stage, _ in ranks
    }
    raise ScheduleError(
        f"stages lie on ranks as in no placement: {dict(sorted(homes.items()))}",
        remedy="known placements: line (rank = stage modulo ranks), v, mirror",
    )


def _direction(
    placement: Placement, ranks: dict[tuple[int, int], int], microbatch: int
) -> Direction | None:
    """The direction in which a micro-batch goes through a placement; None when in neither."""
    for direction in Direction if placement.up is not None else (Direction.DOWN,):
        if all(
            ranks.get((stage, microbatch), home) == home
            for stage in range(placement.num_stages)
            for home in (placement.rank_of(stage, direction),)
        ):
            return direction
    return None
