"""Pictures of schedules say what the timeline says."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from deepopt.schedule.builders import build
from deepopt.schedule.draw import draw_order, draw_svg, draw_text, perfetto
from deepopt.schedule.ir import Direction, PlacementKind, directions_of, parse_action, place
from deepopt.schedule.simulate import CostTable, Timeline, simulate


def timeline(name: str, kind: PlacementKind, *, ranks: int, microbatches: int) -> Timeline:
    placement = place(kind, num_ranks=ranks)
    half = microbatches // 2
    directions = directions_of(
        [half, microbatches - half], num_directions=placement.num_directions
    )
    schedule = build(name, placement=placement, directions=directions)
    costs = CostTable.uniform(placement.num_stages, forward_s=1, input_s=1, weight_s=1)
    return simulate(schedule, costs)


ONE_F_ONE_B = timeline("1f1b", PlacementKind.LINE, ranks=2, microbatches=3)
MIRROR = timeline("bi_stream", PlacementKind.MIRROR, ranks=2, microbatches=4)
ZB_V = timeline("zb_v", PlacementKind.V, ranks=2, microbatches=4)


def test_the_grid_of_1f1b_on_two_ranks() -> None:
    assert draw_text(ONE_F_ONE_B).splitlines() == [
        "F forward, B backward",
        "rank 0  F0|F1|      B0---|F2|B1---|   B2---|",
        "rank 1     F0|B0---|F1|B1---|F2|B2---|",
        "1f1b: 12 s a step, bubble 25.0%",
    ]


def test_lower_case_is_the_way_up() -> None:
    rows = draw_text(MIRROR).splitlines()
    assert "lower case: direction up" in rows[0]
    assert re.search(r"\bF0\|", rows[1])
    assert re.search(r"\bf2\|", rows[1])
    assert "lower case: second leg" in draw_text(ZB_V)


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_width_is_kept_and_no_action_vanishes(width: int) -> None:
    for row in draw_text(ONE_F_ONE_B, width=width).splitlines()[1:-1]:
        assert len(row) <= max(width, len("rank 0  ") + 6) + 1
        assert row.count("F") == row.count("B") == 3


def test_colour_adds_escapes_and_nothing_else_but_fill() -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", draw_text(MIRROR, color=True))
    assert plain != draw_text(MIRROR, color=True)
    assert "\x1b" not in draw_text(MIRROR)
    assert re.findall(r"[FIWBfiwb]\d+", plain) == re.findall(
        r"[FIWBfiwb]\d+", draw_text(MIRROR)
    )


def test_a_fault_is_marked() -> None:
    fault = parse_action("1B1")
    assert "!B1" in draw_text(ONE_F_ONE_B, fault=fault)
    order = draw_order(ONE_F_ONE_B.schedule, fault=fault).splitlines()
    assert order[0].split() == ["rank", "0", "0F0", "0F1", "0B0", "0F2", "0B1", "0B2"]
    assert order[1].split() == ["rank", "1", "1F0", "1B0", "1F1", "!1B1", "1F2", "1B2"]
    assert draw_svg(ONE_F_ONE_B).count("#d0021b") == 0
    assert draw_svg(ONE_F_ONE_B, fault=fault).count("#d0021b") == 1


def test_the_svg_is_well_formed_and_holds_every_action() -> None:
    root = ElementTree.fromstring(draw_svg(MIRROR, title="a <title> & more"))
    titles = [element.text or "" for element in root.iter() if element.tag.endswith("title")]
    actions = [str(action) for row in MIRROR.schedule.actions for action in row]
    assert sorted(title.split(":")[0] for title in titles) == sorted(actions)


def test_the_perfetto_trace_has_a_track_per_rank_in_microseconds() -> None:
    events = json.loads(perfetto(MIRROR))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in slices} == {0, 1}
    assert len(slices) == sum(map(len, MIRROR.spans))
    first = next(event for event in slices if event["tid"] == 0)
    assert (first["name"], first["ts"], first["dur"]) == ("0F0", 0.0, 1e6)
    assert first["args"] == {"stage": 0, "microbatch": 0, "direction": "down"}
    ups = {e["args"]["microbatch"] for e in slices if e["args"]["direction"] == Direction.UP}
    assert ups == {2, 3}


def test_a_step_with_updates_is_drawn_with_them() -> None:
    schedule = ONE_F_ONE_B.schedule
    costs = CostTable(forward_s=(1, 1), input_s=(1, 1), weight_s=(1, 1), update_s=(1, 1))
    drawn = simulate(schedule, costs)
    assert "+0|" in draw_text(drawn)
    assert "reduce and update" in draw_svg(drawn)
    assert '"1REDUCE"' in perfetto(drawn)


def test_a_table_of_zeros_can_be_drawn() -> None:
    costs = CostTable.uniform(2, forward_s=0, input_s=0, weight_s=0)
    nothing = simulate(ONE_F_ONE_B.schedule, costs)
    assert "bubble 0.0%" in draw_text(nothing)
    ElementTree.fromstring(draw_svg(nothing))
