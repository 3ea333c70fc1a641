"""The classical orders by name: `build("1f1b", placement=..., directions=...)`.

Each builder is a pure function of a placement and the directions of the micro-batches; every
one accepts any number of micro-batches, fewer than ranks too. What it does not do: verify
(`verify`), add sends and receives (`lowering`), choose by cost (`search`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.build_line import (
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    zb_h1,
    zb_h2,
    zb_h3,
)
from deepopt.schedule.build_mirror import bi_stream
from deepopt.schedule.build_v import dual_pipe_v, v_half, zb_v
from deepopt.schedule.compact import CompactSchedule, Row, expand
from deepopt.schedule.ir import Direction, Placement, PlacementKind, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """One named order.

    Args:
        summary: one line for people.
        placements: kinds of placement it is made for.
        rows: makes the codes of every rank, see `compact`.
        most_stages_per_rank: with placement line; None for any number.
    """

    summary: str
    placements: tuple[PlacementKind, ...]
    rows: Callable[[Placement, Sequence[Direction]], tuple[Row, ...]]
    most_stages_per_rank: int | None = None


_LINE = (PlacementKind.LINE,)
_V = (PlacementKind.V,)

BUILDERS: dict[str, Builder] = {
    "gpipe": Builder(
        summary="all forwards, then all backwards",
        placements=(PlacementKind.LINE, PlacementKind.V),
        rows=gpipe,
    ),
    "1f1b": Builder(
        summary="one forward, one backward: at most p micro-batches in flight",
        placements=_LINE,
        rows=one_f_one_b,
        most_stages_per_rank=1,
    ),
    "interleaved_1f1b": Builder(
        summary="1F1B over several stages a rank: a smaller bubble for more messages",
        placements=_LINE,
        rows=interleaved_one_f_one_b,
    ),
    "zb_h1": Builder(
        summary="1F1B with late weight gradients: a smaller bubble in the same memory",
        placements=_LINE,
        rows=zb_h1,
        most_stages_per_rank=1,
    ),
    "zb_h2": Builder(
        summary="later weight gradients, 2p - 1 micro-batches in flight",
        placements=_LINE,
        rows=zb_h2,
        most_stages_per_rank=1,
    ),
    "zb_h3": Builder(
        summary="for steps that overlap: hides links too, 3p - 2 micro-batches in flight",
        placements=_LINE,
        rows=zb_h3,
        most_stages_per_rank=1,
    ),
    "zb_v": Builder(
        summary="two stages a rank, weight gradients in the gaps, p micro-batches in flight",
        placements=_V,
        rows=zb_v,
    ),
    "v_half": Builder(
        summary="two stages a rank, half of 1F1B's activations",
        placements=_V,
        rows=v_half,
    ),
    "dual_pipe_v": Builder(
        summary="two stages a rank, forwards paired with backwards",
        placements=_V,
        rows=dual_pipe_v,
    ),
    "bi_stream": Builder(
        summary="micro-batches enter from both ends; every stage lives on two ranks",
        placements=(PlacementKind.MIRROR,),
        rows=bi_stream,
    ),
}


def build(name: str, *, placement: Placement, directions: Sequence[Direction]) -> Schedule:
    """Make a schedule by the name of its builder.

    Args:
        name: a key of `BUILDERS`.
        placement: stages on ranks.
        directions: direction of each micro-batch, at least one; `up` only with two directions.

    Raises:
        ScheduleError: no such builder, or it does not fit the placement or the directions.
    """
    return expand(build_compact(name, placement=placement, directions=directions))


def build_compact(
    name: str, *, placement: Placement, directions: Sequence[Direction]
) -> CompactSchedule:
    """As `build`, in 4 bytes an action: for orders of millions.

    Args:
        name: as for `build`.
        placement: as for `build`.
        directions: as for `build`.

    Raises:
        ScheduleError: as for `build`.
    """
    builder = BUILDERS.get(name)
    if builder is None:
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        raise ScheduleError(
            f"there is no schedule {name!r}",
            remedy=(f"did you mean {close[0]!r}? " if close else "")
            + f"known schedules: {', '.join(BUILDERS)}",
        )
    if problem := misfit(name, placement=placement):
        raise ScheduleError(problem[0], remedy=problem[1])
    if not directions:
        raise ScheduleError(
            f"schedule {name} needs at least one micro-batch, got none",
            remedy="set training.microbatches to at least one per replica",
        )
    if placement.num_directions == 1 and Direction.UP in directions:
        raise ScheduleError(
            f"placement {placement.kind} has one direction, "
            f"but micro-batch {list(directions).index(Direction.UP)} goes up",
            remedy="use placement mirror for two directions",
        )
    return CompactSchedule(
        name=name,
        placement=placement,
        directions=tuple(directions),
        rows=builder.rows(placement, directions),
    )


def misfit(name: str, *, placement: Placement) -> tuple[str, str] | None:
    """Why a known builder cannot serve a placement, and what to do; None when it can.

    Args:
        name: a key of `BUILDERS`.
        placement: stages on ranks.
    """
    builder = BUILDERS[name]
    per_rank = placement.num_stages // placement.num_ranks
    fitting = [
        other
        for other, candidate in BUILDERS.items()
        if placement.kind in candidate.placements
        and _stages_fit(candidate, placement.kind, per_rank)
    ]
    remedy = (
        f"choose pipeline.schedule auto or one of {', '.join(fitting)}, "
        f"or pipeline.placement {' or '.join(builder.placements)}"
    )
    if placement.kind not in builder.placements:
        return f"schedule {name} does not fit placement {placement.kind}", remedy
    if not _stages_fit(builder, placement.kind, per_rank):
        return (
            f"schedule {name} runs {builder.most_stages_per_rank} stage per rank, "
            f"the placement has {placement.num_stages} stages on {placement.num_ranks} rank(s)",
            remedy,
        )
    return None


def _stages_fit(builder: Builder, kind: PlacementKind, per_rank: int) -> bool:
    most = builder.most_stages_per_rank
    return kind is not PlacementKind.LINE or most is None or per_rank <= most
