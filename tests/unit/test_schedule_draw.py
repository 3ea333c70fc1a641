"""Pictures of schedules say what the timeline says."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from deepopt.schedule.builders import build
from deepopt.schedule.draw import draw_order, draw_text
from deepopt.schedule.draw_files import draw_svg, perfetto
from deepopt.schedule.faults import Fault
from deepopt.schedule.ir import Direction, PlacementKind, directions_of, parse_action, place
from deepopt.schedule.simulate import CostTable, Timeline, simulate


def timeline(
    name: str, kind: PlacementKind, *, ranks: int, microbatches: int, per_rank: int = 1
) -> Timeline:
    placement = place(kind, num_ranks=ranks, stages_per_rank=per_rank)
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


def bands(text: str) -> list[list[str]]:
    """The rows of ranks of each band."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("rank 0"):
            found.append([])
        if line.startswith("rank "):
            found[-1].append(line)
    return found


def test_the_grid_of_1f1b_on_two_ranks() -> None:
    assert draw_text(ONE_F_ONE_B).splitlines() == [
        "F forward, B backward (I and W)",
        "rank 0  F0|F1|      B0---|F2|B1---|   B2---|",
        "rank 1     F0|B0---|F1|B1---|F2|B2---|",
        "        ^0 ms          ^5000          ^10000",
    ]


def test_an_axis_can_be_left_out_where_costs_have_no_unit() -> None:
    assert draw_text(ONE_F_ONE_B, axis=False).splitlines()[-1].startswith("rank 1")


def test_lower_case_is_the_way_up() -> None:
    rows = draw_text(MIRROR).splitlines()
    assert "lower case: direction up" in rows[0]
    assert re.search(r"\bF0\|", rows[1])
    assert re.search(r"\bf2\|", rows[1])
    assert "lower case: second leg" in draw_text(ZB_V)


def test_ranks_of_many_stages_are_drawn_with_the_stage_of_each_action() -> None:
    two = timeline("interleaved_1f1b", PlacementKind.LINE, ranks=2, microbatches=2, per_rank=2)
    assert "lower case: second stage of the rank" in draw_text(two)
    three = timeline(
        "interleaved_1f1b", PlacementKind.LINE, ranks=2, microbatches=2, per_rank=3
    )
    assert "4F1" in draw_text(three)
    assert "6F5: stage 6" in draw_text(three)


@pytest.mark.parametrize("width", [24, 30, 40, 200])
def test_a_width_is_kept_and_what_is_longer_goes_on_below(width: int) -> None:
    drawn = draw_text(ONE_F_ONE_B, width=width, most_bands=None)
    assert all(len(line) <= width for line in drawn.splitlines()[1:])
    whole = bands(draw_text(ONE_F_ONE_B))[0]
    for rank, row in enumerate(whole):
        pieces = [band[rank][len("rank 0  ") :] for band in bands(drawn)]
        room = width - len("rank 0  ")
        assert len(pieces) >= len(row[8:]) / room
        assert "".join(pieces).replace(" ", "") == row[8:].replace(" ", "")


def test_too_many_bands_are_squeezed_into_one() -> None:
    drawn = draw_text(MIRROR, width=20, most_bands=1)
    assert "a column shows what fills most of it" in drawn
    (band,) = bands(drawn)
    assert all(len(row) <= 20 for row in band)
    assert set("".join(row[8:] for row in band)) <= set("FIWBfiwb ")
    # Twelve seconds of three ops each on twelve columns: a letter a second, idle left blank.
    twelve = draw_text(ONE_F_ONE_B, width=8 + 12, most_bands=1)
    assert bands(twelve) == [["rank 0  FF  BBFBB BB", "rank 1   FBBFBBFBB"]]


def test_colour_adds_escapes_and_nothing_else_but_fill() -> None:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", draw_text(MIRROR, color=True))
    assert plain != draw_text(MIRROR, color=True)
    assert "\x1b" not in draw_text(MIRROR)
    assert re.findall(r"[FIWBfiwb]\d+", plain) == re.findall(
        r"[FIWBfiwb]\d+", draw_text(MIRROR)
    )


def test_a_band_of_colour_does_not_run_into_the_next_line() -> None:
    for line in draw_text(MIRROR, color=True, width=40).splitlines():
        escapes = re.findall(r"\x1b\[[0-9;]*m", line)
        assert not escapes or escapes[-1] == "\x1b[0m"


def test_a_fault_and_what_it_is_about_are_marked() -> None:
    fault = Fault(
        rank=1,
        action=parse_action("1B1"),
        message="",
        related=(parse_action("1F1"), parse_action("0B0")),
    )
    rows = draw_order(ONE_F_ONE_B.schedule, fault=fault).splitlines()
    assert rows[0].split() == ["rank", "0", "0F0", "0F1", "~0B0", "0F2", "0B1", "0B2"]
    assert rows[1].split() == ["rank", "1", "1F0", "1B0", "~1F1", "!1B1", "1F2", "1B2"]
    assert rows[2] == "! 1B1   ~ 1F1, 0B0"
    assert "!" not in draw_order(ONE_F_ONE_B.schedule)


def test_a_missing_action_is_drawn_where_it_should_be() -> None:
    fault = Fault(rank=1, action=parse_action("1F3"), message="", is_missing=True)
    rows = draw_order(ONE_F_ONE_B.schedule, fault=fault).splitlines()
    assert rows[1].split()[2:] == ["1F0", "1B0", "1F1", "1B1", "1F2", "!1F3", "1B2"]
    assert rows[2] == "! 1F3 should be about here"


@pytest.mark.parametrize("action", ["0F0", "0B5", "1B2"])
def test_long_orders_are_cut_around_the_fault(action: str) -> None:
    long = timeline("1f1b", PlacementKind.LINE, ranks=2, microbatches=6).schedule
    fault = Fault(rank=int(action[0]), action=parse_action(action), message="")
    drawn = draw_order(long, width=40, fault=fault)
    assert all(len(line) <= 40 for line in drawn.splitlines())
    assert f"!{action}" in drawn
    assert ".." in drawn


def test_the_svg_is_well_formed_and_holds_every_action() -> None:
    root = ElementTree.fromstring(draw_svg(MIRROR, title="a <title> & more"))
    titles = [element.text or "" for element in root.iter() if element.tag.endswith("title")]
    actions = [str(action) for row in MIRROR.schedule.actions for action in row]
    assert sorted(title.split(":")[0] for title in titles) == sorted(actions)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "a <title> & more" in texts
    assert "full: down, pale: up" in texts


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
    assert "rank 0  FFBFBB" in draw_text(nothing)
    ElementTree.fromstring(draw_svg(nothing))
