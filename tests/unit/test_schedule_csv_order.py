"""Orders leave for and come back from torch's CSV format; torch itself agrees with them."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import BUILDERS, build
from deepopt.schedule.csv_order import from_csv, to_csv
from deepopt.schedule.ir import Direction, PlacementKind, Schedule, place
from deepopt.schedule.verify import verify

DOWN, UP = Direction.DOWN, Direction.UP


def make(name: str, ranks: int, microbatches: int, stages_per_rank: int = 1) -> Schedule:
    kind = BUILDERS[name].placements[0]
    placement = place(kind, num_ranks=ranks, stages_per_rank=stages_per_rank)
    down = microbatches // 2 if kind is PlacementKind.MIRROR else microbatches
    directions = (DOWN,) * down + (UP,) * (microbatches - down)
    return build(name, placement=placement, directions=directions)


def test_cells_are_printed_actions() -> None:
    assert to_csv(make("1f1b", 2, 2), transfers=False) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    with_transfers = to_csv(make("1f1b", 2, 1), transfers=True)
    assert with_transfers.splitlines()[0] == "0F0,0SEND_F0,0RECV_B0,0B0"


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(BUILDERS)), st.integers(2, 5), st.integers(2, 7), st.booleans())
def test_every_order_comes_back_as_it_left(
    name: str, ranks: int, microbatches: int, transfers: bool
) -> None:
    schedule = make(name, ranks, microbatches)
    returned = from_csv(to_csv(schedule, transfers=transfers), name=name)
    assert returned == schedule


def test_gaps_sharding_and_overlap_of_torch_are_read() -> None:
    text = "0UNSHARD,0F0,,(0F1;0B0)OVERLAP_F_B,0B1,0REDUCE_GRAD,0RESHARD\n"
    schedule = from_csv(text, name="torch")
    assert str(schedule) == "0F0 0F1 0B0 0B1"
    verify(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0,1X0\n", "row 2: '1X0' is not an action"),
        ("0F0,0REDUCE,0B0\n", "row 1: '0REDUCE' is not an action of this format"),
        ("\n", "has no actions"),
        ("0F0,1F0,0B0\n2F0,1B0,2B0\n", "as in no placement"),
        ("0F0,0B0,1F1,1B1\n1F0,1B0,0F1,0B1,2F0\n", "as in no placement"),
    ],
)
def test_what_is_not_an_order_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        from_csv(text, name="wrong")


def test_a_preparation_cannot_be_exported() -> None:
    schedule = make("1f1b", 1, 1)
    with_r = Schedule(
        name="r",
        placement=schedule.placement,
        directions=schedule.directions,
        actions=from_csv("0F0,0R0,0B0\n", name="r").actions,
    )
    with pytest.raises(ScheduleError, match="0R0 has no name"):
        to_csv(with_r, transfers=False)


@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved_1f1b", 2),
        ("zb_h2", 1),
        ("zb_v", 1),
        ("v_half", 1),
        ("dual_pipe_v", 1),
    ],
)
def test_torch_runs_our_lowered_order_to_its_end(name: str, per_rank: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    schedule = make(name, 4, 9, per_rank)
    rows = csv.reader(io.StringIO(to_csv(schedule, transfers=True)))
    orders = {
        rank: [schedules._Action.from_str(cell) for cell in row]
        for rank, row in enumerate(rows)
    }
    placement = schedule.placement
    schedules._simulate_comms_compute(
        orders, lambda stage: placement.down[stage], placement.num_stages
    )
