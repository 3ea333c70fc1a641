"""The simulator against closed forms, published limits, and a slow simulation in plain steps."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import ScheduleError
from deepopt.schedule.builders import BUILDERS, build
from deepopt.schedule.ir import (
    Action,
    Direction,
    Op,
    PlacementKind,
    Schedule,
    parse_action,
    place,
)
from deepopt.schedule.simulate import CostTable, simulate

DOWN = Direction.DOWN


def make(name: str, ranks: int, microbatches: int, **placement: Any) -> Schedule:
    kind = BUILDERS[name].placements[0]
    placed = place(kind, num_ranks=ranks, **placement)
    down = microbatches // 2 if kind is PlacementKind.MIRROR else microbatches
    directions = (DOWN,) * down + (Direction.UP,) * (microbatches - down)
    return build(name, placement=placed, directions=directions)


def even(schedule: Schedule, forward: float, inputs: float, weight: float) -> CostTable:
    """Times of one rank's work on a micro-batch, shared by its stages."""
    per_rank = schedule.placement.num_stages / schedule.placement.num_ranks
    return CostTable.uniform(
        schedule.placement.num_stages,
        forward_s=forward / per_rank,
        input_s=inputs / per_rank,
        weight_s=weight / per_rank,
    )


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 5), (4, 4), (4, 16), (8, 8)])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_wait_p_minus_1_forwards_and_backwards(
    name: str, ranks: int, microbatches: int
) -> None:
    schedule = make(name, ranks, microbatches)
    timeline = simulate(schedule, even(schedule, 2, 3, 1))
    assert timeline.makespan_s == microbatches * 6 + (ranks - 1) * 6
    assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_1f1b_with_fewer_microbatches_than_ranks_waits_as_long() -> None:
    schedule = make("1f1b", 6, 2)
    assert simulate(schedule, even(schedule, 2, 3, 1)).makespan_s == (2 + 5) * 6


@pytest.mark.parametrize("per_rank", [2, 3])
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(per_rank: int) -> None:
    schedule = make("interleaved_1f1b", 4, 8, stages_per_rank=per_rank)
    timeline = simulate(schedule, even(schedule, 2, 3, 1))
    assert timeline.makespan_s == pytest.approx(8 * 6 + 3 * 6 / per_rank)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("costs", [(1, 1, 1), (20, 22, 16)])
def test_zb_h1_has_its_published_bubble(ranks: int, costs: tuple[int, int, int]) -> None:
    schedule = make("zb_h1", ranks, 2 * ranks)
    forward, inputs, weight = costs
    makespan = simulate(schedule, even(schedule, *costs)).makespan_s
    assert makespan == 2 * ranks * sum(costs) + (ranks - 1) * (forward + inputs - weight)


@pytest.mark.parametrize(
    ("name", "costs", "bubble"),
    [
        ("zb_h2", (1, 1, 1), lambda p: 0),
        ("zb_h2", (20, 22, 16), lambda p: (p - 1) * (20 + 22 - 2 * 16)),
        ("zb_v", (1, 1, 1), lambda p: 0),
    ],
)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zb_h2_and_zb_v_have_their_published_bubble_inside_each_ranks_span(
    name: str, costs: tuple[int, int, int], bubble: Any, ranks: int
) -> None:
    schedule = make(name, ranks, 2 * ranks)
    timeline = simulate(schedule, even(schedule, *costs))
    idle = [
        spans[-1].end_s - spans[0].start_s - busy
        for spans, busy in zip(timeline.spans, timeline.busy_s, strict=True)
    ]
    assert max(idle) == pytest.approx(bubble(ranks))


# arXiv:2401.10241, tables 5 and 9: T_F, T_B, T_W, T_comm in ms, and the bubble rates that its
# authors computed from them: 1 - m (T_F + T_B + T_W) / the longest span of a rank.
@pytest.mark.parametrize(
    ("ranks", "microbatches", "times_ms", "rates"),
    [
        (8, 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674, 0.0444)),
        (8, 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698)),
        (16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266)),
        (32, 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641)),
    ],
)
def test_bubbles_with_slow_hops_are_the_published_ones(
    ranks: int,
    microbatches: int,
    times_ms: tuple[float, float, float, float],
    rates: tuple[float, float, float],
) -> None:
    forward, inputs, weight, comm = times_ms
    costs = CostTable.uniform(
        ranks, forward_s=forward, input_s=inputs, weight_s=weight, latency_s=comm
    )
    for name, rate in zip(("1f1b", "zb_h1", "zb_h2"), rates, strict=True):
        timeline = simulate(make(name, ranks, microbatches), costs)
        ours = 1 - microbatches * (forward + inputs + weight) / timeline.steady_s
        assert ours == pytest.approx(rate, abs=6e-5)


# facts: simulated limits of p = 4 with F = I = W, as efficiencies in percent.
@pytest.mark.parametrize(
    ("name", "at_8", "at_16"), [("1f1b", 72.7, 84.2), ("zb_v", 94.1, 97.0)]
)
def test_efficiency_limits_are_the_known_ones(name: str, at_8: float, at_16: float) -> None:
    for microbatches, expected in ((8, at_8), (16, at_16)):
        schedule = make(name, 4, microbatches)
        bubble = simulate(schedule, even(schedule, 20, 20, 20)).bubble
        assert 100 * (1 - bubble) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_v_half_waits_about_half_as_long_as_1f1b(ranks: int) -> None:
    schedule = make("v_half", ranks, 4 * ranks)
    bubble_s = simulate(schedule, even(schedule, 1, 1, 1)).makespan_s - 12 * ranks
    assert bubble_s <= 0.6 * 3 * (ranks - 1)  # 0.5 published; a few units more at its tail


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("per_rank", [1, 2, 4])
def test_bi_stream_is_faster_than_1f1b(ranks: int, per_rank: int) -> None:
    microbatches = ranks * per_rank
    mirror, line = make("bi_stream", ranks, microbatches), make("1f1b", ranks, microbatches)
    fast = simulate(mirror, even(mirror, 1, 1, 1)).makespan_s
    slow = simulate(line, even(line, 1, 1, 1)).makespan_s
    assert fast - 3 * microbatches <= 0.7 * (slow - 3 * microbatches)


def slowly(schedule: Schedule, costs: CostTable) -> float:
    """Relax start times until nothing changes: no queues, no wake-ups."""
    placement = schedule.placement
    last = placement.num_stages - 1
    end: dict[tuple[str, int, int | None], float] = {}
    finished: list[float] = []
    for _ in range(sum(map(len, schedule.actions)) + 1):
        before = dict(end)
        finished = []
        for rank, row in enumerate(schedule.actions):
            free = 0.0
            for action in row:
                stage, microbatch = action.stage, action.microbatch
                kind = {Op.F: "F", Op.I: "I", Op.B: "I"}.get(action.op, "")
                other = (
                    ("F", stage - 1, microbatch)
                    if kind == "F" and stage
                    else ("I", stage + 1, microbatch)
                    if kind == "I" and stage < last
                    else None
                )
                start = free
                if other is not None:
                    maker = schedule.rank_of(Action(other[1], Op.F, microbatch))
                    hop = costs.latency_between(maker, target=rank)
                    start = max(start, end.get(other, 0.0) + hop)
                factor = costs.rank_factor[rank] if costs.rank_factor else 1.0
                free = start + factor * costs.duration_s(stage, op=action.op)
                end[kind or str(action), stage, microbatch] = free
            finished.append(free)
        if end == before:
            break
    return max(finished)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_costs_give_the_makespan_of_the_slow_simulation(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(BUILDERS)))
    ranks = data.draw(st.integers(1, 4))
    schedule = make(name, ranks, data.draw(st.integers(1, 5)))
    stages = schedule.placement.num_stages
    times = st.integers(1, 9).map(float)
    some = st.tuples(*[times] * stages)
    costs = CostTable(
        forward_s=data.draw(some),
        input_s=data.draw(some),
        weight_s=data.draw(some),
        rank_factor=data.draw(st.tuples(*[times] * ranks)),
        latency_s=data.draw(times),
        host_of=data.draw(st.tuples(*[st.integers(0, 1)] * ranks)),
        inter_host_latency_s=data.draw(times),
    )
    assert simulate(schedule, costs).makespan_s == slowly(schedule, costs)


def line(*rows: str) -> Schedule:
    actions = tuple(tuple(parse_action(word) for word in row.split()) for row in rows)
    count = 1 + max(action.microbatch or 0 for row in actions for action in row)
    return Schedule(
        name="by_hand",
        placement=place(PlacementKind.LINE, num_ranks=len(rows)),
        directions=(DOWN,) * count,
        actions=actions,
    )


TWO = line("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")


def test_a_send_does_not_block_compute_but_takes_its_time() -> None:
    costs = CostTable.uniform(2, forward_s=1, input_s=1, weight_s=0, latency_s=5)
    timeline = simulate(TWO, costs)
    first = [(str(span.action), span.start_s) for span in timeline.spans[0]]
    assert first == [("0F0", 0), ("0F1", 1), ("0B0", 13), ("0B1", 15)]


def test_transfers_of_one_route_follow_each_other() -> None:
    costs = CostTable.uniform(2, forward_s=1, input_s=1, weight_s=0, transfer_s=4)
    starts = {str(s.action): s.start_s for row in simulate(TWO, costs).spans for s in row}
    assert starts["1F0"] == 5  # F0 ends at 1, its transfer at 5
    assert starts["1F1"] == 9  # F1 ends at 2, its transfer waits for the first


def test_a_route_between_hosts_has_its_own_latency_and_transfer_time() -> None:
    costs = CostTable(
        forward_s=(1, 1),
        input_s=(1, 1),
        weight_s=(0, 0),
        transfer_s=4,
        host_of=(7, 3),
        inter_host_latency_s=5,
        inter_host_transfer_s=10,
    )
    starts = {str(s.action): s.start_s for row in simulate(TWO, costs).spans for s in row}
    assert starts["1F0"] == 1 + 10 + 5
    assert starts["1F1"] == 1 + 10 + 10 + 5
    assert costs.hop_between(0, target=1) == 15
    assert costs.hop_between(1, target=1) == 0


def test_ranks_of_one_host_keep_the_plain_latency_and_transfer_time() -> None:
    plain = CostTable.uniform(2, forward_s=1, input_s=1, weight_s=0, latency_s=5, transfer_s=4)
    hosted = replace(plain, host_of=(0, 0), inter_host_latency_s=9, inter_host_transfer_s=9)
    assert simulate(TWO, hosted).spans == simulate(TWO, plain).spans


def test_a_slow_rank_takes_longer_for_everything() -> None:
    costs = CostTable(forward_s=(1, 1), input_s=(1, 1), weight_s=(0, 0), rank_factor=(1.0, 3.0))
    assert simulate(TWO, costs).busy_s == (4, 12)


def test_a_preparation_takes_its_own_time() -> None:
    costs = CostTable(forward_s=(1,), input_s=(1,), weight_s=(1,), prepare_s=(7,))
    assert simulate(line("0F0 0R0 0B0"), costs).makespan_s == 10


def test_one_shared_core_runs_all_ranks_one_after_the_other() -> None:
    schedule = make("1f1b", 4, 6)
    costs = even(schedule, 2, 3, 1)
    assert simulate(schedule, costs, cores=1).makespan_s == 4 * 6 * 6


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(BUILDERS)), st.integers(1, 6), st.integers(1, 8))
def test_cores_only_slow_down_and_enough_of_them_change_nothing(
    name: str, ranks: int, microbatches: int
) -> None:
    schedule = make(name, ranks, microbatches)
    costs = even(schedule, 2, 3, 1)
    free = simulate(schedule, costs)
    assert simulate(schedule, costs, cores=ranks) == free
    two = simulate(schedule, costs, cores=2)
    assert two.makespan_s >= max(free.makespan_s, sum(free.busy_s) / 2) - 1e-9
    edges = sorted(
        moment
        for row in two.spans
        for span in row
        for moment in ((span.start_s, 1), (span.end_s, -1))
    )
    running = 0
    for _, change in edges:
        running += change
        assert running <= 2


@given(st.sampled_from(sorted(BUILDERS)), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_spans_of_a_rank_follow_its_order_without_overlap(
    name: str, ranks: int, microbatches: int
) -> None:
    schedule = make(name, ranks, microbatches)
    timeline = simulate(schedule, even(schedule, 1, 1, 1))
    for row, spans in zip(schedule.actions, timeline.spans, strict=True):
        assert tuple(span.action for span in spans) == row
        assert all(a.end_s <= b.start_s for a, b in pairwise(spans))


def test_copies_are_charged_for_their_exchange_and_their_update() -> None:
    schedule = make("bi_stream", 2, 2)
    costs = CostTable(
        forward_s=(1, 1),
        input_s=(1, 1),
        weight_s=(1, 1),
        reduce_s=(4, 4),
        update_s=(2, 2),
    )
    plain = simulate(schedule, even(schedule, 1, 1, 1))
    timeline = simulate(schedule, costs)
    for rank, spans in enumerate(timeline.spans):
        updates = [span for span in spans if span.action.op is Op.REDUCE]
        assert sorted(s.action.stage for s in updates) == [0, 1]
        assert timeline.busy_s[rank] == plain.busy_s[rank] + 4
    assert timeline.makespan_s >= plain.makespan_s + 2


def test_a_deadlock_is_told_not_simulated() -> None:
    with pytest.raises(ScheduleError, match="rank 0 waits for ever before 0B0"):
        simulate(
            line("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
            CostTable.uniform(2, forward_s=1, input_s=1, weight_s=1),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_s": (1.0,)}, "2 stages in forward_s, 1 in input_s"),
        ({"update_s": (1.0,)}, "2 stages in forward_s, 1 in update_s"),
        ({"latency_s": -1.0}, "negative or not finite"),
        ({"host_of": (0, 1), "inter_host_latency_s": -1.0}, "negative or not finite"),
        ({"inter_host_latency_s": 1.0}, "does not say where the ranks are"),
        ({"forward_s": (1.0, float("nan"))}, "negative or not finite"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"forward_s": (1.0, 1.0), "input_s": (1.0, 1.0), "weight_s": (1.0, 1.0)}
    with pytest.raises(ScheduleError, match=message):
        CostTable(**{**fields, **changes})


def test_a_table_of_another_size_is_refused() -> None:
    costs = CostTable.uniform(3, forward_s=1, input_s=1, weight_s=1)
    with pytest.raises(ScheduleError, match="3 stages, the schedule 2"):
        simulate(TWO, costs)
    slow = CostTable(forward_s=(1, 1), input_s=(1, 1), weight_s=(1, 1), rank_factor=(1,))
    with pytest.raises(ScheduleError, match="1 rank factors, the schedule 2 ranks"):
        simulate(TWO, slow)
    spread = CostTable(forward_s=(1, 1), input_s=(1, 1), weight_s=(1, 1), host_of=(0, 0, 1))
    with pytest.raises(ScheduleError, match="3 hosts of ranks, the schedule 2 ranks"):
        simulate(TWO, spread)
