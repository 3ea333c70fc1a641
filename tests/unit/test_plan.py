"""Plans: `auto` is resolved, what cannot work is refused with values and a remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.decide import make_plan, resolve_groups
from deepopt.planner.estimate import estimated_costs, relative_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.outcome import Candidate
from deepopt.planner.plan import Plan
from deepopt.planner.shapes import Shape
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton
from deepopt.schedule.ir import Direction, PlacementKind
from deepopt.schedule.verify import verify

LITTLE = 5_000  # actions: a search in milliseconds
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
    return make_plan(
        job(**sections), model(layers), num_workers=workers, plan_id=1, effort=LITTLE
    ).plan


def test_one_worker_is_a_line_with_1f1b() -> None:
    made = plan(1)
    assert (made.placement, made.schedule, made.boundaries) == (LINE, "1f1b", (0,))


def test_auto_compares_every_placement_and_takes_the_fastest() -> None:
    planned = make_plan(job(), model(8), num_workers=4, plan_id=1, effort=LITTLE)
    comparison = planned.comparison
    assert comparison is not None
    times = [found.step_s for _, found in comparison.found]
    assert times == sorted(times)
    assert comparison.best.shape == Shape(kind=planned.plan.placement)
    assert {c.shape.kind for c, _ in comparison.found} == {LINE, V, MIRROR}
    assert [reason for _, reason in comparison.left_out] == [
        "12 stages (3 a rank) need at least 12 layers, the model has 8",
        "16 stages (4 a rank) need at least 16 layers, the model has 8",
    ]
    made = planned.plan
    assert (made.pipeline_size, made.data_size, made.num_groups) == (4, 1, 2)
    assert comparison.one_f_one_b_s is not None
    assert times[0] < comparison.one_f_one_b_s


def test_a_searched_order_is_named_by_the_hash_of_what_it_was_searched_for() -> None:
    def searched(**sections: dict[str, Any]) -> Plan:
        asked = job(pipeline={"placement": "mirror"}, **sections)
        return make_plan(asked, model(8), num_workers=4, plan_id=1, effort=LITTLE).plan

    first = searched()
    assert first.schedule == "searched"
    assert len(first.orders) == 1
    assert searched().orders == first.orders
    assert searched(training={"microbatches": 12}).orders != first.orders


def test_costs_and_shared_cores_decide() -> None:
    costs = LayerCosts(
        forward_s=(1.0,) * 8,
        input_s=(1.0,) * 8,
        weight_s=(1.0,) * 8,
        update_s=(1.0,) * 8,
        source="test",
    )

    def made(**changes: Any) -> Plan:
        return make_plan(
            job(), model(8), num_workers=4, plan_id=1, effort=LITTLE, **changes
        ).plan

    assert made(costs=costs).placement is not MIRROR  # its second update costs too much
    # One core does all the work in any order; what does least work wins.
    assert made(costs=costs, cores=1).placement is not MIRROR


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"groups": 1}},
        {"training": {"microbatches": 1}},
        {"parallel": {"data": 2}},
    ],
)
def test_auto_has_one_direction_where_the_groups_cannot_be_shared(
    sections: dict[str, Any],
) -> None:
    planned = make_plan(job(**sections), model(8), num_workers=4, plan_id=1, effort=LITTLE)
    assert planned.plan.placement in (LINE, V)
    assert planned.comparison is not None
    assert (
        "cannot be shared"
        in dict(planned.comparison.left_out)[Candidate(shape=Shape(kind=MIRROR))]
    )


def test_replicas_share_the_workers() -> None:
    made = plan(4, parallel={"data": 2}, training={"groups": 4})
    assert (made.pipeline_size, made.data_size) == (2, 2)
    assert len(made.orders) in (0, 2)


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


@pytest.mark.parametrize("placement", ["line", "v", "mirror"])
def test_a_named_placement_is_kept_and_its_order_searched(placement: str) -> None:
    made = plan(2, pipeline={"placement": placement})
    assert made.placement == placement


def test_boundaries_are_taken_as_written() -> None:
    made = plan(2, pipeline={"boundaries": [0, 5]})
    assert made.boundaries == (0, 5)


def test_boundaries_with_several_stages_a_rank_are_interleaved_or_folded() -> None:
    made = plan(2, pipeline={"boundaries": [0, 2, 4, 6]})
    assert made.placement in (LINE, V)
    assert made.boundaries == (0, 2, 4, 6)


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
    asked = job(pipeline={"placement": "line", "schedule": "1f1b"})
    made = make_plan(asked, heavy, num_workers=2, plan_id=1).plan
    assert made.boundaries == (0, 3)


def test_parameters_stand_for_operations_that_nobody_stated() -> None:
    assert relative_costs(model(2, flops=0.0, numel=5)) == (5.0, 5.0)
    assert relative_costs(model(2, flops=0.0, numel=0)) == (1.0, 1.0)


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
    second = make_plan(job(), model(8), num_workers=4, plan_id=2, effort=LITTLE).plan
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
        planned = make_plan(
            job(
                parallel={"data": data},
                pipeline={"placement": placement},
                training={"microbatches": microbatches, "groups": groups},
            ),
            model(12),
            num_workers=ranks * data,
            plan_id=1,
            effort=1,
        )
    except PlanError:
        assert groups % ((2 if placement == "mirror" else 1) * data)
        return
    made, seen = planned.plan, 0
    for replica in range(data):
        directions = made.directions(replica)
        seen += len(directions)
        schedule = planned.schedules[replica]
        assert schedule.directions == directions
        assert schedule.placement == made.make_placement()
        verify(schedule)
        if made.placement is MIRROR:
            assert set(directions) == set(Direction)
    assert seen == microbatches


def emulated(**emulation: Any) -> dict[str, dict[str, Any]]:
    return {
        "worker": {"device": "emulated"},
        "emulation": {
            "forward_ms": 1,
            "input_ms": 1,
            "weight_ms": 1,
            "output_mb": 1,
            "activation_mb": 8,
            "state_mb": 4,
            **emulation,
        },
    }


def test_a_slow_device_is_moved_to_where_the_light_layers_are() -> None:
    heavy = [4, 4, 1, 1, 1, 1, 4, 4]
    sections = emulated(
        forward_ms=heavy, input_ms=heavy, weight_ms=heavy, rank_factor=[1, 1, 1, 4]
    )
    line = {"placement": "line", "schedule": "1f1b"}
    moved = plan(4, pipeline=line, **sections)
    assert moved.order[-1] != 3
    assert moved.make_placement().down == moved.order
    kept = plan(4, pipeline={**line, "boundaries": moved.boundaries}, **sections)
    assert kept.order == ()


def test_as_few_layers_run_again_as_the_memory_needs() -> None:
    sections = emulated(memory_mb=[100, 100])
    given = {"placement": "line", "schedule": "1f1b"}
    made = plan(2, pipeline={**given, "recompute": "auto"}, **sections)
    assert made.recompute == ()  # 2 x 32 + 16 fit
    sections = emulated(memory_mb=[58, 58])
    made = plan(2, pipeline={**given, "recompute": "auto"}, **sections)
    assert made.recompute is not None
    assert 0 < len(made.recompute) < 8
    with pytest.raises(PlanError, match="1f1b does not fit"):
        plan(2, pipeline=given, **sections)
    assert Plan.from_json(made.to_json()) == made


def test_a_model_that_fits_nowhere_is_told_how_much_memory_would_do() -> None:
    with pytest.raises(PlanError, match="smallest memory that would do is"):
        plan(2, **emulated(memory_mb=[30, 30]))


def test_both_uses_of_tied_weights_have_states_and_an_exchange() -> None:
    plain = model(3)
    last = plain.layers[-1]
    tied = replace(
        plain,
        layers=(
            *plain.layers[:-1],
            replace(last, parameters=(replace(last.parameters[0], tied_to="blocks.0.weight"),)),
        ),
    )
    costs = estimated_costs(job(), tied)
    assert costs.ties == ((0, 2, 16.0),)
    assert costs.state_bytes == estimated_costs(job(), plain).state_bytes
