"""A pipeline that is only thought of costs what its few figures say, however it is cut."""

from __future__ import annotations

import pytest

from deepopt.errors import PlanError
from deepopt.planner.shapes import SHAPES, Shape
from deepopt.planner.sketch import Pipeline, layers_of_ops, stage_cap, two_groups
from deepopt.schedule.ir import Direction, PlacementKind, place

KINDS = [
    (PlacementKind.LINE, 1),
    (PlacementKind.LINE, 2),
    (PlacementKind.LINE, 3),
    (PlacementKind.V, 1),
    (PlacementKind.MIRROR, 1),
]


def sketch(
    *ops: tuple[float, ...], ranks: int = 4, microbatches: int = 8, **more: float
) -> Pipeline:
    layers = layers_of_ops(ops, num_ranks=ranks, stages_per_rank=4, **more)  # type: ignore[arg-type]
    return Pipeline(num_ranks=ranks, replicas=two_groups(microbatches), layers=layers)


@pytest.mark.parametrize(("kind", "per_rank"), KINDS)
def test_one_entry_is_a_ranks_share_on_every_placement(
    kind: PlacementKind, per_rank: int
) -> None:
    pipeline = sketch((2.0, 3.0, 1.0, 0.5), update_s=4.0, exchange_s=8.0, transfer_s=0.25)
    shape = Shape(kind=kind, stages_per_rank=per_rank)
    placement = pipeline.place(shape)
    table = pipeline.table(pipeline.cuts(shape)[0], placement=placement)
    stages_a_share = placement.num_stages // placement.num_ranks
    assert len(set(map(len, (table.forward_s, table.input_s, table.update_s)))) == 1
    for times, share in (
        (table.forward_s, 2.0),
        (table.input_s, 3.0),
        (table.weight_s, 1.0),
        (table.prepare_s, 0.5),
        (table.update_s, 4.0),
    ):
        assert times == pytest.approx((share / stages_a_share,) * placement.num_stages)
    assert table.transfer_s == pytest.approx(0.25)
    if kind is PlacementKind.MIRROR:
        assert table.reduce_s == pytest.approx((8.0,) * 4)
    else:
        assert table.reduce_s == ()


def test_an_entry_for_each_layer_is_cut_by_work() -> None:
    ops = [(1.0, 1.0, 1.0)] * 6 + [(3.0, 3.0, 3.0)]
    pipeline = sketch(*ops, ranks=3)
    line = SHAPES[0]
    table = pipeline.table(pipeline.cuts(line)[0], placement=pipeline.place(line))
    assert table.forward_s == (3.0, 3.0, 3.0)


def test_more_stages_than_layers_are_refused() -> None:
    pipeline = sketch(*[(1.0, 1.0, 1.0)] * 5)
    with pytest.raises(PlanError, match=r"8 stages \(2 a rank\) need at least 8 layers"):
        pipeline.cuts(Shape(kind=PlacementKind.V, stages_per_rank=2))


def test_fewer_layers_than_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="costs of 2 layers were given for 4 ranks"):
        sketch((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))


def test_a_factor_for_each_rank_or_none() -> None:
    with pytest.raises(PlanError, match="2 rank factors were given for 4 ranks"):
        sketch((1.0, 1.0, 1.0), rank_factor=(1.0, 2.0))  # type: ignore[arg-type]


def test_a_pipeline_has_ranks_and_microbatches() -> None:
    with pytest.raises(PlanError, match=r"\[0\] micro-batches on 4 ranks"):
        sketch((1.0, 1.0, 1.0), microbatches=0)


def test_the_first_half_of_the_microbatches_goes_down_a_mirror() -> None:
    down, up = Direction.DOWN, Direction.UP
    pipeline = sketch((1.0, 1.0, 1.0), microbatches=5)
    mirror = pipeline.place(Shape(kind=PlacementKind.MIRROR))
    assert pipeline.directions(mirror) == ((down, down, up, up, up),)
    assert pipeline.directions(pipeline.place(SHAPES[0])) == ((down,) * 5,)
    one = sketch((1.0, 1.0, 1.0), microbatches=1)
    assert one.directions(mirror) == ((down,),)


@pytest.mark.parametrize(
    ("cap", "kind", "per_rank", "stages"),
    [
        (4, PlacementKind.LINE, 1, 4),
        (4, PlacementKind.V, 1, 8),
        (2.5, PlacementKind.LINE, 2, 5),
        (2.4, PlacementKind.LINE, 2, 4),
        (4, PlacementKind.MIRROR, 1, 4),
    ],
)
def test_a_cap_in_shares_becomes_a_cap_in_stages(
    cap: float, kind: PlacementKind, per_rank: int, stages: int
) -> None:
    placement = place(kind, num_ranks=4, stages_per_rank=per_rank)
    assert stage_cap(cap, placement=placement) == stages
