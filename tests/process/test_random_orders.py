"""Searched orders for random costs and sizes, run over gloo: the losses of one process, no deadlock.

Sends may not run ahead here: a rank waits until its last message on a channel was asked for before it
sends the next one there, which is the least that an order has to get by with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepopt.config import JobConfig
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.process_group import ProcessGroupTransport
from deepopt.pipeline.same_host_transport import SameHostTransport
from deepopt.pipeline.transport import Channel, Transport
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind, Schedule, place
from deepopt.schedule.lowering import lower
from deepopt.schedule.search import search
from deepopt.schedule.simulate import CostTable
from deepopt.schedule.verify import verify
from deepopt.schedule.verify_lowered import verify_lowered
from deepopt.worker.rehearsal import RankPlan, RehearsalGroup, stand_in

LAYERS = 8
STEPS = 2
SHAPES = [
    (PlacementKind.LINE, 1),
    (PlacementKind.LINE, 2),
    (PlacementKind.V, 1),
    (PlacementKind.MIRROR, 1),
]


def narrow_plan(rank: int, transport: Transport, **arguments: Any) -> RankPlan:
    """A rank whose channels hold one message that nobody asked for yet."""
    assert isinstance(transport, SameHostTransport)
    sockets = transport._inner  # a send there ends when its receiver has asked for it
    assert isinstance(sockets, ProcessGroupTransport)
    if "send" not in vars(sockets):
        send = sockets.send
        last: dict[Channel, deque[Any]] = {}

        def send_after_the_last(
            channel: Channel, message: int, tensors: Sequence[torch.Tensor]
        ) -> None:
            for work, _ in last.get(channel, ()):
                work.wait()
            send(channel, message, tensors)
            last[channel], sockets._sends = sockets._sends, deque()

        sockets.send = send_after_the_last  # type: ignore[method-assign]
    return RankPlan(rank, sockets, **arguments)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, RehearsalGroup]]:
    with (
        RehearsalGroup(2, make=narrow_plan, timeout_s=30) as two,
        RehearsalGroup(3, make=narrow_plan, timeout_s=30) as three,
        RehearsalGroup(4, make=narrow_plan, timeout_s=30) as four,
    ):
        yield {2: two, 3: three, 4: four}


@st.composite
def searched(draw: st.DrawFn) -> tuple[JobConfig, Plan, Schedule]:
    kind, per_rank = draw(st.sampled_from(SHAPES))
    ranks = draw(st.integers(2, 4))
    count = draw(st.integers(2 if kind is PlacementKind.MIRROR else 1, 7))
    recompute = draw(st.booleans())
    placement = place(kind, num_ranks=ranks, stages_per_rank=per_rank)
    stages = placement.num_stages
    times = st.lists(st.integers(1, 9).map(float), min_size=stages, max_size=stages).map(tuple)
    costs = CostTable(
        forward_s=draw(times),
        input_s=draw(times),
        weight_s=draw(times),
        prepare_s=draw(times) if recompute else (),
        latency_s=draw(st.sampled_from([0.0, 0.5, 4.0])),
    )
    job = stand_in(
        JobConfig.model_validate(
            {
                "training": {"microbatches": count},
                "optimizer": {"learning_rate": 0.1},
                "pipeline": {
                    "recompute": "full" if recompute else "none",
                    "receive_lookahead": draw(st.sampled_from([1, 4])),
                },
            }
        ),
        num_layers=LAYERS,
    )
    job = job.model_copy(update={"worker": job.worker.model_copy(update={"device": "cpu"})})
    edges = sorted(draw(st.permutations(range(1, LAYERS)))[: stages - 1])
    plan = plan_of(job, boundaries=(0, *edges), kind=kind, ranks=ranks)
    found = search(
        placement,
        directions=plan.directions(0),
        costs=costs,
        memory_cap=draw(st.sampled_from([None, per_rank + 2])),
        effort=3_000,
        seed=draw(st.integers(0, 99)),
    )
    return job, plan, found.schedule


def plan_of(
    job: JobConfig, *, boundaries: tuple[int, ...], kind: PlacementKind, ranks: int
) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=tuple(f"layers.{index}" for index in range(LAYERS)),
        boundaries=boundaries,
        placement=kind,
        schedule="1f1b",
        pipeline_size=ranks,
        data_size=1,
        num_microbatches=job.training.microbatches,
        num_groups=min(2, job.training.microbatches),
    )


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=searched())
def test_a_searched_order_trains_like_one_process_with_one_send_under_way(
    groups: dict[int, RehearsalGroup], case: tuple[JobConfig, Plan, Schedule]
) -> None:
    job, plan, schedule = case
    verify(schedule)
    verify_lowered(schedule, rows=lower(schedule, reduce=True), buffers=1)
    group = groups[plan.pipeline_size]
    group.load("case", job=job, plan=plan, schedules=(schedule,))
    alone = plan_of(job, boundaries=(0,), kind=PlacementKind.LINE, ranks=1)
    expected = RankPlan(0, LoneTransport(), job=job, plan=alone).run(STEPS).losses
    assert group.run("case", num_steps=STEPS).ranks[0].losses == expected
