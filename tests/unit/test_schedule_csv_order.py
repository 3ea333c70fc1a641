"""Orders leave for and come back from torch's CSV format; torch itself agrees with them."""

from __future__ import annotations

import csv
import io

import pytest
import torch.distributed.pipelining.schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import BUILDERS, build
from deepopt.schedule.csv_order import from_csv, to_csv, transfers_from_csv
from deepopt.schedule.ir import Direction, PlacementKind, Schedule, place
from deepopt.schedule.lowering import lower
from deepopt.schedule.simulate import CostTable, simulate
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


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(BUILDERS)), st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_every_order_comes_back_as_it_left_and_runs(
    name: str, ranks: int, microbatches: int, transfers: bool
) -> None:
    schedule = make(name, ranks, microbatches, 2 if name == "interleaved_1f1b" else 1)
    text = to_csv(schedule, transfers=transfers)
    if schedule.placement.kind is PlacementKind.MIRROR and ranks == 1:
        return  # one rank has both directions: no file can say which micro-batch goes where
    returned = from_csv(text, name=name)
    assert returned.actions == schedule.actions
    assert returned.placement.kind is schedule.placement.kind or ranks == 1
    verify(returned)
    if transfers:
        rows = transfers_from_csv(text)
        assert rows == (lower(schedule, reduce=False) if ranks > 1 else None)
    num_stages = returned.placement.num_stages
    costs = CostTable.uniform(num_stages, forward_s=2, input_s=3, weight_s=1, latency_s=0.5)
    assert simulate(returned, costs).makespan_s == simulate(schedule, costs).makespan_s


def test_gaps_sharding_and_overlap_of_torch_are_read() -> None:
    text = "0UNSHARD,0F0,,(0F1;0B0)OVERLAP_F_B,0B1,0REDUCE_GRAD,0RESHARD\n"
    schedule = from_csv(text, name="torch")
    assert str(schedule) == "0F0 0F1 0B0 0B1"
    verify(schedule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0,1X0\n", "o.csv:2: '1X0' is not an action"),
        ("0F0,0REDUCE,0B0\n", "o.csv:1: '0REDUCE' is not an action of this format"),
        ("0F0,0B0\n" + "x" * 500, "o.csv:2: 'x{60}..' is not an action"),
        ("0F0,0B0\n1F" + "9" * 5000, "o.csv:2: '1F9+..' is not an action"),
        ("\n", "o.csv holds no order: it is empty"),
        ("", "o.csv holds no order: it is empty"),
        ("0F0,0B0\n\n2F0,2B0\n", "o.csv:2: rank 1 has no action"),
        ("0F0,0B0\n,,\n", "o.csv:2: rank 1 has no action"),
        ("0F0,0B0\n2F0,2B0\n", "o.csv: no action is of stage 1, but 2F0 is of stage 2"),
        ("0F0,0F99999999\n", "of micro-batch 1, but 0F99999999 is of micro-batch 99999999"),
        ("0F0,1F0,0B0\n2F0,1B0,2B0\n", "o.csv: 3 stages on 2 ranks fit no placement"),
        (
            "0F0,1F0,1B0,0B0\n2F0,3F0,3B0,2B0\n",
            "o.csv: stages lie on ranks as in no placement: stage 0 on rank 0, stage 1 on rank 0",
        ),
    ],
)
def test_what_is_not_an_order_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        from_csv(text, name="wrong", source="o.csv")


def test_a_single_slip_is_left_to_verify_which_names_it() -> None:
    text = to_csv(make("1f1b", 4, 4), transfers=False).replace("2F3,", "").strip() + ",2F3\n"
    order = from_csv(text, name="slip")
    assert order.placement == place(PlacementKind.LINE, num_ranks=4)
    with pytest.raises(ScheduleError, match="rank 3: 2F3 belongs to rank 2"):
        verify(order)


def test_blank_ends_and_a_byte_order_mark_are_no_ranks() -> None:
    text = "\ufeff0F0, 0B0\r\n1F0,1B0\r\n\r\n \n"
    assert str(from_csv(text, name="windows")) == "0F0 0B0\n1F0 1B0"


def test_a_preparation_comes_back_too() -> None:
    order = from_csv("0F0,0R0,0B0\n", name="r")
    assert to_csv(order, transfers=False) == "0F0,0R0,0B0\n"


class Stage:
    """As much of torch's PipelineStage as its schedules ask for an order."""

    def __init__(self, index: int, *, ranks: int, stages: int) -> None:
        self.stage_index = index
        self.group_rank = 0
        self.group_size = ranks
        self.num_stages = stages
        self.is_first = index == 0
        self.is_last = index == stages - 1
        self.has_backward = True
        self.submod = torch.nn.Identity()


def by_torch(name: str, *, per_rank: int, ranks: int, microbatches: int) -> str:
    """An order that torch makes by itself, as `_dump_csv` writes it."""
    schedules = torch.distributed.pipelining.schedules
    stages = [Stage(i, ranks=ranks, stages=per_rank * ranks) for i in range(per_rank)]
    made = getattr(schedules, name)(stages if per_rank > 1 else stages[0], microbatches)
    text = io.StringIO()
    csv.writer(text).writerows(made.pipeline_order[rank] for rank in range(ranks))
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "per_rank", "kind"),
    [
        ("ScheduleInterleaved1F1B", 2, PlacementKind.LINE),
        ("ScheduleInterleaved1F1B", 4, PlacementKind.LINE),
        ("ScheduleInterleavedZeroBubble", 2, PlacementKind.LINE),
        ("ScheduleZBVZeroBubble", 2, PlacementKind.V),
        ("ScheduleDualPipeV", 2, PlacementKind.V),
    ],
)
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_an_order_made_by_torch_is_read_and_right(
    name: str, per_rank: int, kind: PlacementKind, ranks: int, microbatches: int
) -> None:
    text = by_torch(name, per_rank=per_rank, ranks=ranks, microbatches=microbatches)
    order = from_csv(text, name=name)
    assert order.placement == place(kind, num_ranks=ranks, stages_per_rank=per_rank)
    assert order.num_microbatches == microbatches
    verify(order)
    assert from_csv(to_csv(order, transfers=True), name=name) == order


def test_the_fault_in_torchs_printed_1f1b_is_found() -> None:
    # torch 2.13 runs 1F1B by other code; in the order that it prints, the last rank begins with F1.
    text = by_torch("Schedule1F1B", per_rank=1, ranks=4, microbatches=8)
    with pytest.raises(ScheduleError, match=r"0F8 is missing: of micro-batch 8 .* but 3F8"):
        verify(from_csv(text, name="1F1B"))


def test_torchs_looped_bfs_adds_gradients_backwards_and_is_refused_for_it() -> None:
    text = by_torch("ScheduleLoopedBFS", per_rank=2, ranks=4, microbatches=8)
    with pytest.raises(ScheduleError, match="rank 0: 4B7 runs before 4B6, but the gradients"):
        verify(from_csv(text, name="BFS"))


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
    schedules = torch.distributed.pipelining.schedules
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
