"""Plans: `auto` is resolved, what cannot work is refused with values and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.decide import layer_costs, make_plan, resolve_groups
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton
from deepopt.schedule.builders import build
from deepopt.schedule.ir import Direction, PlacementKind
from deepopt.schedule.verify import verify

MIRROR, LINE, V = PlacementKind.MIRROR, PlacementKind.LINE, PlacementKind.V


def model(num_layers: int, *, flops: float = 1.0, numel: int = 4) -> ModelSkeleton:
    return ModelSkeleton(
        factory="package.module:build",
        kwargs={},
        layers=tuple(
            LayerSkeleton(
                name=f"blocks.{i}",
                kind="Block",
                parameters=(
                    ParameterSkeleton(
                        name=f"blocks.{i}.weight", shape=(numel,), dtype="float32"
                    ),
                ),
                forward_flops_per_token=flops,
            )
            for i in range(num_layers)
        ),
    )


def job(**sections: dict[str, Any]) -> JobConfig:
    return JobConfig.model_validate(sections)


def plan(workers: int, *, layers: int = 8, **sections: dict[str, Any]) -> Plan:
    return make_plan(job(**sections), model(layers), num_workers=workers, plan_id=1)


def test_one_worker_is_a_line_with_1f1b() -> None:
    made = plan(1)
    assert (made.placement, made.schedule, made.boundaries) == (LINE, "1f1b", (0,))


def test_auto_on_several_workers_is_a_mirror_with_bi_stream() -> None:
    made = plan(4)
    assert (made.placement, made.schedule) == (MIRROR, "bi_stream")
    assert made.boundaries == (0, 2, 4, 6)
    assert (made.pipeline_size, made.data_size, made.num_groups) == (4, 1, 2)


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"groups": 1}},
        {"training": {"microbatches": 1}},
        {"parallel": {"data": 2}},
    ],
)
def test_auto_is_a_line_where_the_groups_cannot_be_shared(sections: dict[str, Any]) -> None:
    made = plan(4, **sections)
    assert (made.placement, made.schedule) == (LINE, "1f1b")


def test_replicas_share_the_workers() -> None:
    made = plan(4, parallel={"data": 2}, training={"groups": 4})
    assert (made.pipeline_size, made.data_size, made.placement) == (2, 2, MIRROR)


@pytest.mark.parametrize(
    ("schedule", "placement", "num_stages"),
    [
        ("gpipe", LINE, 2),
        ("1f1b", LINE, 2),
        ("interleaved_1f1b", LINE, 4),
        ("zb_v", V, 4),
        ("bi_stream", MIRROR, 2),
    ],
)
def test_a_named_schedule_decides_the_placement(
    schedule: str, placement: PlacementKind, num_stages: int
) -> None:
    made = plan(2, pipeline={"schedule": schedule})
    assert (made.placement, made.schedule) == (placement, schedule)
    assert made.num_stages == num_stages


@pytest.mark.parametrize(
    ("placement", "schedule"), [("line", "1f1b"), ("v", "zb_v"), ("mirror", "bi_stream")]
)
def test_a_named_placement_decides_the_schedule(placement: str, schedule: str) -> None:
    assert plan(2, pipeline={"placement": placement}).schedule == schedule


def test_boundaries_are_taken_as_written() -> None:
    made = plan(2, pipeline={"boundaries": [0, 5]})
    assert (made.boundaries, made.placement) == ((0, 5), MIRROR)


def test_boundaries_with_several_stages_a_rank_are_interleaved() -> None:
    made = plan(2, pipeline={"boundaries": [0, 2, 4, 6]})
    assert (made.placement, made.schedule) == (LINE, "interleaved_1f1b")


def test_stages_follow_the_cost_of_layers() -> None:
    skeleton = model(4)
    heavy = ModelSkeleton(
        factory=skeleton.factory,
        kwargs={},
        layers=(
            *skeleton.layers[:3],
            LayerSkeleton(name="head", kind="Head", parameters=(), forward_flops_per_token=3),
        ),
    )
    made = make_plan(job(pipeline={"placement": "line"}), heavy, num_workers=2, plan_id=1)
    assert made.boundaries == (0, 3)


def test_parameters_stand_for_operations_that_nobody_stated() -> None:
    assert layer_costs(model(2, flops=0.0, numel=5)) == (5.0, 5.0)
    assert layer_costs(model(2, flops=0.0, numel=0)) == (1.0, 1.0)


REFUSED = {
    "more stages than layers": (
        {"workers": 4, "layers": 3},
        "4 stages need at least 4 layers, the model has 3",
        "at most 3 worker",
    ),
    "two stages a rank without the layers": (
        {"workers": 2, "layers": 3, "pipeline": {"placement": "v"}},
        r"4 stages \(2 a rank\) need at least 4 layers",
        "at most 1 worker",
    ),
    "workers that do not divide": (
        {"workers": 3, "parallel": {"data": 2}},
        "3 workers cannot form 2 replicas",
        "--workers 2 or 4",
    ),
    "fewer workers than replicas": (
        {"workers": 1, "parallel": {"data": 2}},
        "1 workers cannot form 2 replicas",
        "--workers 2,",
    ),
    "axes that do not make the workers": (
        {"workers": 4, "parallel": {"pipeline": 3}},
        "parallel.pipeline 3 x parallel.data 1 makes 3 workers, the job has 4",
        "--workers 3",
    ),
    "groups for a mirror": (
        {"workers": 2, "training": {"groups": 3}, "pipeline": {"placement": "mirror"}},
        r"3 gradient groups cannot be shared by 1 replica\(s\) of 2 directions",
        "multiple of 2",
    ),
    "groups for replicas": (
        {"workers": 4, "training": {"groups": 3}, "parallel": {"data": 2}},
        "3 gradient groups cannot be shared by 2 replica",
        "multiple of 2",
    ),
    "one micro-batch for two replicas": (
        {"workers": 2, "training": {"microbatches": 1}, "parallel": {"data": 2}},
        "1 gradient groups cannot be shared by 2 replica",
        "training.microbatches",
    ),
    "a schedule with a typing error": (
        {"workers": 2, "pipeline": {"schedule": "bistream"}},
        "'bistream' is not a schedule",
        "did you mean 'bi_stream'",
    ),
    "a schedule of another placement": (
        {"workers": 2, "pipeline": {"placement": "line", "schedule": "bi_stream"}},
        "schedule bi_stream does not fit placement line",
        "placement mirror",
    ),
    "a schedule with one stage a rank": (
        {"workers": 2, "pipeline": {"boundaries": [0, 2, 4, 6], "schedule": "1f1b"}},
        r"schedule 1f1b runs 1 stage per rank",
        "interleaved_1f1b",
    ),
    "boundaries behind the last layer": (
        {"workers": 2, "pipeline": {"boundaries": [0, 8]}},
        "starts a stage at layer 8, the model has 8 layers",
        "stay below 8",
    ),
    "boundaries of another number of ranks": (
        {"workers": 2, "pipeline": {"boundaries": [0, 2, 4]}},
        r"cuts 3 stages; placement line on 2 rank\(s\) takes a multiple of 2",
        "leave out pipeline.boundaries",
    ),
    "no workers": ({"workers": 0}, "at least one worker, got 0", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_values_and_a_remedy(case: str) -> None:
    arguments, message, remedy = REFUSED[case]
    with pytest.raises(PlanError, match=message) as error:
        plan(**arguments)
    assert remedy in error.value.remedy


def test_groups_default_to_two_and_never_exceed_the_microbatches() -> None:
    assert resolve_groups(job()) == 2
    assert resolve_groups(job(training={"microbatches": 1})) == 1
    assert resolve_groups(job(training={"microbatches": 6, "groups": 6})) == 6
    wrong = job().model_copy(
        update={"training": job().training.model_copy(update={"groups": 9})}
    )
    with pytest.raises(PlanError, match="8 micro-batches cannot form 9 gradient groups"):
        resolve_groups(wrong)


def test_a_plan_survives_json_and_its_fingerprint_leaves_out_its_number() -> None:
    first = plan(4)
    assert Plan.from_json(first.to_json()) == first
    second = make_plan(job(), model(8), num_workers=4, plan_id=2)
    assert first.fingerprint() == second.fingerprint() != plan(2).fingerprint()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from(["auto", "line", "v", "mirror"]),
)
def test_every_plan_that_is_made_has_a_right_schedule_for_each_replica(
    ranks: int, data: int, microbatches: int, placement: str
) -> None:
    groups = min(2 * data, microbatches)
    try:
        made = plan(
            ranks * data,
            layers=12,
            parallel={"data": data},
            pipeline={"placement": placement},
            training={"microbatches": microbatches, "groups": groups},
        )
    except PlanError:
        assert groups % ((2 if placement == "mirror" else 1) * data)
        return
    seen = 0
    for replica in range(data):
        directions = made.directions(replica)
        seen += len(directions)
        schedule = build(made.schedule, placement=made.make_placement(), directions=directions)
        verify(schedule)
        if made.placement is MIRROR:
            assert set(directions) == set(Direction)
    assert seen == microbatches
