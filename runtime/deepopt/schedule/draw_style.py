"""How an action looks in every picture: its colour, its label, its place in the legend.

Upper-case letters and full colours are the way down; lower-case letters and pale colours the way
up: direction `up` of a mirror, the second leg of a V, every second stage of a rank of a line.
"""

from __future__ import annotations

from collections.abc import Iterable

from deepopt.schedule.ir import Action, Direction, Op, PlacementKind, Schedule

NAMES = {
    Op.F: "forward",
    Op.I: "input gradient",
    Op.W: "weight gradient",
    Op.B: "backward (I and W)",
    Op.R: "prepare a backward",
    Op.REDUCE: "reduce and update",
}

# Fills that keep black text readable and stay apart for the colour-blind: down, up.
FILL = {
    Op.F: ("#8ab6e8", "#c3e3f5"),
    Op.I: ("#8fd19e", "#cdeec9"),
    Op.W: ("#f2cf73", "#faeaba"),
    Op.B: ("#63b8a7", "#aedfd3"),
    Op.R: ("#cfa9dd", "#e8d5ef"),
    Op.REDUCE: ("#c8c8c8", "#c8c8c8"),
}

_BLACK_ON = "\x1b[38;5;16;48;5;"
_ON_256 = {  # nearest of the 256 terminal colours to FILL
    Op.F: (75, 153),
    Op.I: (114, 194),
    Op.W: (221, 229),
    Op.B: (73, 152),
    Op.R: (176, 225),
    Op.REDUCE: (250, 250),
}
ANSI = {
    (op, up): f"{_BLACK_ON}{color}m"
    for op, pair in _ON_256.items()
    for up, color in enumerate(pair)
}
ANSI_FAULT = "\x1b[1;97;41m"
ANSI_RELATED = f"{_BLACK_ON}214m"
ANSI_END = "\x1b[0m"

_MOST_BY_CASE = 2  # stages of a rank that two cases of a letter can tell apart


def is_up(schedule: Schedule, action: Action) -> bool:
    """Whether an action is drawn as one of the way up.

    Args:
        schedule: gives placement and directions.
        action: one of its actions, or the REDUCE of a stage.
    """
    placement = schedule.placement
    if placement.kind is not PlacementKind.MIRROR:
        return action.stage // placement.num_ranks % 2 == 1
    if action.microbatch is None or action.microbatch >= schedule.num_microbatches:
        return False
    return schedule.directions[action.microbatch] is Direction.UP


def ways(schedule: Schedule) -> tuple[bool, ...]:
    """The values of `is_up` that a schedule has."""
    one_way = schedule.placement.kind is PlacementKind.LINE and _per_rank(schedule) == 1
    return (False,) if one_way else (False, True)


def label(schedule: Schedule, action: Action) -> str:
    """The shortest text that tells an action from the others of its rank: `F5`, `f5`, `6F5`.

    Args:
        schedule: gives placement and directions.
        action: one of its actions, or the REDUCE of a stage: `+2`.
    """
    if action.microbatch is None:
        return f"+{action.stage}"
    if _shows_stages(schedule):
        return str(action)
    letter = action.op.value.lower() if is_up(schedule, action) else action.op.value
    return f"{letter}{action.microbatch}"


def way_words(schedule: Schedule, *, up: bool) -> str:
    """What the two shades of a colour mean.

    Args:
        schedule: gives the placement; has both ways.
        up: which of the two.
    """
    if schedule.placement.kind is PlacementKind.MIRROR:
        return "up" if up else "down"
    if schedule.placement.kind is PlacementKind.V:
        return "second leg" if up else "first leg"
    if _per_rank(schedule) == _MOST_BY_CASE:
        return "second stage" if up else "first stage"
    return "2nd, 4th .. stage" if up else "1st, 3rd .. stage"


def legend_words(schedule: Schedule, ops: Iterable[Op]) -> list[tuple[Op, str]]:
    """Letter and meaning of each op that is there, in the order of a step.

    Args:
        schedule: gives the placement.
        ops: what is drawn.
    """
    there = set(ops)
    return [(op, name) for op, name in NAMES.items() if op in there]


def case_words(schedule: Schedule) -> str:
    """What lower case means in a schedule; empty where there is none."""
    if _shows_stages(schedule):
        return "6F5: stage 6, F, micro-batch 5"
    if len(ways(schedule)) == 1:
        return ""
    if schedule.placement.kind is PlacementKind.MIRROR:
        return "lower case: direction up"
    if schedule.placement.kind is PlacementKind.V:
        return "lower case: second leg"
    return "lower case: second stage of the rank"


def _per_rank(schedule: Schedule) -> int:
    return schedule.placement.num_stages // schedule.placement.num_ranks


def _shows_stages(schedule: Schedule) -> bool:
    return _per_rank(schedule) > _MOST_BY_CASE
