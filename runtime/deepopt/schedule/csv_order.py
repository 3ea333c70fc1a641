"""Orders in the CSV format of `torch.distributed.pipelining`, out and in.

One row per rank, one cell per action: `2F5`, `0I1`, `1W0`, `0B0`; an empty cell is a gap. So orders
can be compared with those of other tools. R is ours: torch does not know it. Text in, text out: no
file is opened here, and torch is not imported.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import (
    COMPUTE_OPS,
    RECEIVE_OPS,
    SEND_OPS,
    Action,
    Direction,
    Placement,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.lowering import Lowered, lower

_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")  # torch: a forward and a backward side by side
_SHARDING = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD)[0-9]*")  # torch: FSDP's affairs
_SHOWN = 60  # characters of a cell in an error: enough for any action, no page of garbage


def to_csv(schedule: Schedule, *, transfers: bool) -> str:
    """A schedule as CSV.

    Args:
        schedule: torch reads it back if it is without R.
        transfers: False for torch's `compute_only`, True for its `compute_comms`.
    """
    rows = lower(schedule, reduce=False) if transfers else schedule.actions
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def from_csv(text: str, *, name: str, source: str = "") -> Schedule:
    """A schedule from CSV; the placement is inferred from who runs what.

    Gaps, transfers and sharding actions are left out; a forward and a backward side by side
    (`OVERLAP_F_B`) run one after the other. The result is not verified.

    Args:
        text: one row per rank.
        name: for the schedule.
        source: where the text is from, for messages: the path of a file.

    Raises:
        ScheduleError: a cell is not an action, or stages lie as in no placement.
    """
    rows = tuple(
        tuple(action for action in row if action.op in COMPUTE_OPS)
        for row in _read(text, source=source)
    )
    where = f"{source}: " if source else ""
    _check_numbers(rows, where)
    placement, directions = _infer(rows, where)
    return Schedule(name=name, placement=placement, directions=directions, actions=rows)


def transfers_from_csv(text: str, *, source: str = "") -> Lowered | None:
    """The actions of a CSV with its sends and receives, as they stand; None where it has none.

    Args:
        text: one row per rank, that `from_csv` reads.
        source: as for `from_csv`.
    """
    rows = tuple(_read(text, source=source))
    transfers = SEND_OPS | RECEIVE_OPS
    return rows if any(action.op in transfers for row in rows for action in row) else None


def _read(text: str, *, source: str) -> list[tuple[Action, ...]]:
    """The actions of each rank; errors name the line."""
    rows: list[tuple[Action, ...]] = []
    reader = csv.reader(io.StringIO(text.strip("\ufeff \t\r\n")), skipinitialspace=True)
    try:
        for cells in reader:
            rows.append(tuple(action for cell in cells for action in _actions(cell.strip())))
            if not rows[-1]:
                raise ScheduleError(
                    f"rank {len(rows) - 1} has no action",
                    remedy="give one line per rank, each with the actions of the rank in order",
                )
    except csv.Error as error:
        raise ScheduleError(
            f"{_line(source, reader.line_num)}this is not CSV: {error}", remedy=_FORMAT
        ) from None
    except ScheduleError as error:
        raise ScheduleError(
            f"{_line(source, reader.line_num)}{error.message}", remedy=error.remedy
        ) from None
    if not rows:
        raise ScheduleError(
            f"{source or 'the text'} holds no order: it is empty", remedy=_FORMAT
        )
    return rows


_FORMAT = "give one line per rank, its actions in order, for example: 0F0,0F1,0B0,0B1"


def _line(source: str, number: int) -> str:
    return f"{source}:{number}: " if source else f"line {number}: "


def _actions(cell: str) -> Iterator[Action]:
    overlap = _OVERLAP.fullmatch(cell)
    for part in overlap[1].split(";") if overlap else (cell,):
        if not part or _SHARDING.fullmatch(part):
            continue
        shown = part if len(part) <= _SHOWN else part[:_SHOWN] + ".."
        try:
            action = parse_action(part)
        except ScheduleError as error:
            raise ScheduleError(f"{shown!r} is not an action", remedy=error.remedy) from None
        if action.microbatch is None:
            raise ScheduleError(
                f"{shown!r} is not an action of this format",
                remedy="leave it out: deepopt adds reductions where they belong",
            )
        yield action


def _check_numbers(rows: Sequence[Sequence[Action]], where: str) -> None:
    """Stages and micro-batches count from 0 without a hole; a slip of a digit is not a pipeline."""
    actions = [action for row in rows for action in row]
    for what, numbers in (
        ("stage", [action.stage for action in actions]),
        ("micro-batch", [action.microbatch or 0 for action in actions]),
    ):
        there = set(numbers)
        missing = next((n for n in range(len(there)) if n not in there), None)
        if missing is not None:
            highest = max(numbers)
            example = actions[numbers.index(highest)]
            raise ScheduleError(
                f"{where}no action is of {what} {missing}, but {example} is of {what} {highest}",
                remedy=f"number the {what}s from 0 without a gap",
            )


def _infer(
    rows: Sequence[Sequence[Action]], where: str
) -> tuple[Placement, tuple[Direction, ...]]:
    """The placement in which the most actions are where they belong.

    With a majority, a single action on a wrong rank is left to `verify`, which names it.
    """
    actions = [(rank, action) for rank, row in enumerate(rows) for action in row]
    num_stages = 1 + max(action.stage for _, action in actions)
    num_microbatches = 1 + max(action.microbatch or 0 for _, action in actions)
    best: tuple[int, Placement, tuple[Direction, ...]] | None = None
    for kind in PlacementKind:
        per_rank = max(1, num_stages // len(rows)) if kind is PlacementKind.LINE else 1
        placement = place(kind, num_ranks=len(rows), stages_per_rank=per_rank)
        if placement.num_stages != num_stages:
            continue
        right = {direction: [0] * num_microbatches for direction in Direction}
        ways = tuple(Direction) if placement.up is not None else (Direction.DOWN,)
        for rank, action in actions:
            assert action.microbatch is not None, f"{action} is a compute action"
            for way in ways:
                right[way][action.microbatch] += placement.rank_of(action.stage, way) == rank
        directions = tuple(
            max(ways, key=lambda way, m=microbatch: right[way][m])  # type: ignore[misc]
            for microbatch in range(num_microbatches)
        )
        total = sum(right[way][m] for m, way in enumerate(directions))
        if best is None or total > best[0]:
            best = (total, placement, directions)
    if best is None:
        raise ScheduleError(
            f"{where}{num_stages} stages on {len(rows)} ranks fit no placement",
            remedy=f"each line is one rank; {len(rows)} ranks hold {len(rows)} stages or a "
            "multiple (line), "
            f"{2 * len(rows)} folded once (v), or {len(rows)} twice (mirror)",
        )
    total, placement, directions = best
    if total <= _MAJORITY * len(actions):
        homes: dict[int, set[int]] = {}
        for rank, action in actions:
            homes.setdefault(action.stage, set()).add(rank)
        shown = ", ".join(
            f"stage {stage} on rank{'s' * (len(ranks) > 1)} {' and '.join(map(str, sorted(ranks)))}"
            for stage, ranks in sorted(homes.items())[:_SHOWN_STAGES]
        )
        more = ", .." if len(homes) > _SHOWN_STAGES else ""
        raise ScheduleError(
            f"{where}stages lie on ranks as in no placement: {shown}{more}",
            remedy="known placements: line (rank = stage modulo ranks), v (folded once), "
            "mirror (stage s on ranks s and ranks - 1 - s)",
        )
    return placement, directions


_MAJORITY = 0.75  # most actions must lie right before one that does not is called a slip
_SHOWN_STAGES = 6
