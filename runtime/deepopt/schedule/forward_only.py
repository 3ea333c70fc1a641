"""The order of work of an evaluation: forwards alone, through any placement. Pure."""

from __future__ import annotations

from deepopt.schedule.ir import Action, Direction, Op, Placement, Schedule


def forward_only(placement: Placement, *, num_microbatches: int) -> Schedule:
    """Every micro-batch through every stage; with two copies of the stages both have work.

    Stage s has the k-th micro-batch of a direction in turn k + s; where a rank has several in one
    turn, the one that is closest to its end comes first. Each action needs one of the turn before, so
    no order of ranks can wait in a circle.

    Args:
        placement: stages on ranks.
        num_microbatches: at least 0.
    """
    up = num_microbatches // 2 if placement.num_directions == 2 else 0
    down = num_microbatches - up
    directions = (Direction.DOWN,) * down + (Direction.UP,) * up
    rows: list[list[tuple[int, int, Action]]] = [[] for _ in range(placement.num_ranks)]
    for microbatch, direction in enumerate(directions):
        place_in_line = microbatch if direction is Direction.DOWN else microbatch - down
        for stage in range(placement.num_stages):
            turn = place_in_line + stage
            rank = placement.rank_of(stage, direction)
            rows[rank].append((turn, -stage, Action(stage, Op.F, microbatch)))
    return Schedule(
        name="forward_only",
        placement=placement,
        directions=directions,
        actions=tuple(
            tuple(action for _, _, action in sorted(row, key=lambda entry: entry[:2]))
            for row in rows
        ),
    )
