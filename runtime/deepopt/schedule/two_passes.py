"""All forwards, then all backwards, through any placement: for loops that stop in between. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.schedule.ir import Action, Direction, Op, Placement, Schedule


def two_passes(placement: Placement, *, directions: Sequence[Direction]) -> Schedule:
    """Every micro-batch forward through every stage, then every one back.

    Stage s has the k-th micro-batch of a direction in turn k + s of the first pass, and in turn
    k + (last stage - s) of the second; where a rank has several in one turn, the one that is closest
    to its end comes first. Each action needs one of the turn before, so no order of ranks can wait in
    a circle. Micro-batches ascend in both passes: so their gradients add in that order.

    Args:
        placement: stages on ranks.
        directions: direction of each micro-batch, at least one.
    """
    last = placement.num_stages - 1
    rows: list[list[tuple[int, int, int, Action]]] = [[] for _ in range(placement.num_ranks)]
    seen = dict.fromkeys(Direction, 0)
    for microbatch, direction in enumerate(directions):
        place_in_line = seen[direction]
        seen[direction] += 1
        for stage in range(placement.num_stages):
            row = rows[placement.rank_of(stage, direction)]
            forward, backward = (Action(stage, op, microbatch) for op in (Op.F, Op.B))
            row.append((0, place_in_line + stage, -stage, forward))
            row.append((1, place_in_line + last - stage, stage, backward))
    return Schedule(
        name="two_passes",
        placement=placement,
        directions=tuple(directions),
        actions=tuple(
            tuple(action for *_, action in sorted(row, key=lambda entry: entry[:3]))
            for row in rows
        ),
    )
