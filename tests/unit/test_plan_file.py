"""Plan files: written and read back the same, every mistake with its line, used or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.plan_check import check_fits, plan_differences
from deepopt.planner.plan_file import PlanFile, rank_factors
from deepopt.planner.plan_make import predicted
from deepopt.planner.plan_text import read_plan_file, write_plan_file
from deepopt.planner.profile import (
    BackgroundSection,
    DeviceSection,
    HardwareSection,
    LayerSection,
    LayerSizes,
    LayerTimes,
    LinkSection,
    TieSection,
)
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton
from support.plan_files import LAYERS, plan_file

NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12
)
FIGURES = st.floats(0, 1e9, allow_nan=False)
RATES = st.none() | st.floats(1e-9, 1e6)


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


@st.composite
def plan_files(draw: st.DrawFn) -> PlanFile:
    names = draw(st.lists(NAMES, min_size=2, max_size=8, unique=True))
    cut = draw(st.integers(1, len(names) - 1))
    layers = []
    for index, name in enumerate(names):
        if index and draw(st.booleans()):
            layers.append(LayerSection(name=name, kind="Block", like=names[index - 1]))
            continue
        times = {op: draw(FIGURES) for op in ("forward", "input", "weight", "update", "spread")}
        sizes = {part: draw(FIGURES) for part in ("parameters", "activation", "output")}
        kind = draw(NAMES)
        layers.append(
            LayerSection(
                name=name,
                kind=kind,
                times_ms=LayerTimes(**times),
                sizes_mb=LayerSizes(**sizes),
            )
        )
    base = plan_file()
    host = draw(NAMES)
    device = DeviceSection(
        rank=0, host=host, device="cuda", name=draw(NAMES), cores=4, memory_mb=draw(FIGURES)
    )
    link = LinkSection(
        ranks=(0, 1), hosts=(host, "two"), latency_us=draw(FIGURES), gb_per_s=draw(RATES)
    )
    hardware = HardwareSection(
        fingerprint="f",
        versions={draw(NAMES): draw(NAMES)},
        exchange_us=draw(FIGURES),
        devices=(
            device,
            device.model_copy(update={"rank": 1, "factor": draw(st.floats(0.1, 9))}),
        ),
        links=(link,),
    )
    edges = [(names[0], names[cut - 1]), (names[cut], names[-1])]
    stages = tuple(
        stage.model_copy(update={"first": first, "last": last})
        for stage, (first, last) in zip(base.stages, edges, strict=True)
    )
    return plan_file(made=draw(NAMES), hardware=hardware, layers=tuple(layers), stages=stages)


@settings(max_examples=60, deadline=None)
@given(plan=plan_files())
def test_what_is_written_is_read_back_the_same(plan: PlanFile) -> None:
    assert read_plan_file(write_plan_file(plan), source="plan.yaml") == plan


def test_a_prediction_and_searched_orders_are_read_back_too() -> None:
    rows = ("0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3", "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3")
    pipeline = plan_file().pipeline.model_copy(update={"schedule": "own"})
    plan = predicted(plan_file(orders=(rows,), pipeline=pipeline))
    again = read_plan_file(write_plan_file(plan), source="plan.yaml")
    assert again == plan
    assert again.predicted is not None
    assert again.predicted.step_ms == pytest.approx(4 * 10.5 + 7.0 + 0.1 + 0.75, rel=0.05)
    assert len(again.plan(plan_id=3).orders) == 1


def test_tied_weights_are_read_back_and_priced() -> None:
    tie = TieSection(layers=("embed", "head"), mb=2.5)
    model = plan_file().model.model_copy(update={"ties": (tie,)})
    plan = read_plan_file(write_plan_file(plan_file(model=model)), source="plan.yaml")
    assert plan.costs().ties == ((0, 4, 2.5e6),)
    other = tie.model_copy(update={"layers": ("embed", "tail")})
    model = model.model_copy(update={"ties": (other,)})
    with pytest.raises(PlanError, match=r"model\.ties names layer tail"):
        plan_file(model=model).costs()


def test_layers_that_are_like_another_have_its_figures_or_their_own() -> None:
    plan = plan_file()
    own = LayerTimes(forward=9.0, input=2.0, weight=0.5)
    changed = plan.layers[2].model_copy(update={"times_ms": own})
    costs = plan_file(layers=(*plan.layers[:2], changed, *plan.layers[3:])).costs()
    assert costs.forward_s == pytest.approx((0.001, 0.001, 0.009, 0.001, 0.001))
    assert costs.activation_bytes == (3e6,) * 5
    assert costs.state_bytes == (16e6,) * 5
    assert costs.memory_bytes == (1e9, 1e9)
    assert (costs.latency_s, costs.bytes_per_s) == pytest.approx((5e-5, 3e9))


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("last: blocks.0, ranks: [0]", "last: embed, ranks: [0]", "first: blocks.1", "a hole"),
        ("first: blocks.1", "first: blocks.0", "last: head, ranks", "an overlap"),
        ("last: head, ranks", "last: tail, ranks", "last: tail", "names layer tail"),
        ("last: head, ranks", "last: blocks.2, ranks", "last: blocks.2", "no stage holds head"),
        ("ranks: [1]}", "ranks: [0]}", "last: head, ranks", "stage 1 lies on ranks [0]"),
        (
            "blocks.2, kind: Block, like: blocks.0",
            "blocks.2, like: nine",
            "nine",
            "is like nine",
        ),
        ("forward: 1.0", "forward: -1.0", "forward: -1.0", "layers[0].times_ms.forward"),
        ("forward: 1.0", 'forward: "1"', 'forward: "1"', "layers[0].times_ms.forward"),
        ("sequence_length: 128", "sequence_len: 128", "sequence_len:", "model.sequence_length"),
        ("  replicas: 1", "  replicas: 2", "  devices:", "2 devices for 2 replica(s)"),
        ('schedule: "1f1b"', "schedule: 2f2b", "pipeline:", "2f2b is no builder"),
        ("format: 1", "format: 2", "format: 2", "format"),
        ("name: embed", "name: blocks.2", "blocks.2, kind", "layer blocks.2 is there twice"),
        ("groups: 2", "groups: 2\n  speed: 1", "speed: 1", "pipeline.speed: unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, place: str, message: str) -> None:
    text = write_plan_file(plan_file())
    assert old in text
    text = text.replace(old, new, 1)
    with pytest.raises(PlanError) as caught:
        read_plan_file(text, source="plan.yaml")
    assert message in caught.value.message
    if "model.sequence_length" in message:  # a missing key has the line of its section
        place = "model:"
    assert caught.value.message.startswith(f"plan.yaml:{line_of(text, place)}: ")
    assert caught.value.remedy


def test_an_order_that_breaks_a_rule_is_refused() -> None:
    rows = ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")
    text = write_plan_file(plan_file(orders=(rows,)))
    with pytest.raises(PlanError, match=r"plan.yaml:\d+: "):
        read_plan_file(text, source="plan.yaml")


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "42"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(Exception, match=r"plan\.yaml:1"):
        read_plan_file(text, source="plan.yaml")


def test_a_job_file_in_the_place_of_a_plan_is_called_so() -> None:
    with pytest.raises(PlanError, match=r"job\.yaml:1: this is no plan file") as caught:
        read_plan_file("training: {steps: 3}\n", source="job.yaml")
    assert "deepopt profile JOB.yaml -o plan.yaml" in caught.value.remedy


# What a plan fits. ---------------------------------------------------------------------------------


def matching() -> tuple[PlanFile, JobConfig, ModelSkeleton]:
    skeleton = ModelSkeleton(
        factory="package.module:build",
        kwargs={},
        layers=tuple(LayerSkeleton(name=name, kind="Block", parameters=()) for name in LAYERS),
    )
    base = plan_file()
    model = base.model.model_copy(
        update={"fingerprint": skeleton.fingerprint(), "parameters": 0}
    )
    job = JobConfig.model_validate({"training": {"microbatches": 4}})
    return plan_file(model=model), job, skeleton


def check(job: JobConfig, **changes: Any) -> None:
    plan, _, skeleton = matching()
    arguments = {
        "job": job,
        "skeleton": skeleton,
        "devices": plan.hardware.devices,
        "num_workers": 2,
        "source": "plan.yaml",
        **changes,
    }
    check_fits(plan, **arguments)


def test_a_plan_fits_what_it_was_made_for() -> None:
    check(matching()[1])
    check(matching()[1], devices=None)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("training", {"microbatch_size": 8}, "microbatch_size was 4 and is 8"),
        ("training", {"microbatches": 6}, "it has 4 micro-batches, the job 6"),
        ("training", {"groups": 4}, "it has 2 gradient groups, the job 4"),
        ("data", {"sequence_length": 64}, "sequence_length was 128 and is 64"),
        ("precision", {"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        ("pipeline", {"recompute": "full"}, "recompute was none and is full"),
    ],
)
def test_another_micro_batch_is_refused_with_the_difference(
    section: str, fields: dict[str, Any], message: str
) -> None:
    job = matching()[1]
    changed = getattr(job, section).model_copy(update=fields)
    with pytest.raises(PlanError) as caught:
        check(job.model_copy(update={section: changed}))
    assert message in caught.value.message


def test_a_plan_measured_with_other_linear_maps_in_fp8_is_refused() -> None:
    _, job, skeleton = matching()
    first, second, *rest = skeleton.layers
    weight = ParameterSkeleton(name="w", shape=(128, 128), dtype="float32", fp8=True)
    changed = replace(skeleton, layers=(first, replace(second, parameters=(weight,)), *rest))
    with pytest.raises(PlanError, match="fp8_linears was 0 and is 1"):
        check(job, skeleton=changed)


def test_another_model_is_refused_with_the_difference() -> None:
    _, job, skeleton = matching()
    fewer = ModelSkeleton(factory="a:b", kwargs={}, layers=skeleton.layers[:-1])
    with pytest.raises(PlanError, match="5 layers, the job's model 4"):
        check(job, skeleton=fewer)
    renamed = (*skeleton.layers[:-1], LayerSkeleton(name="tail", kind="", parameters=()))
    other = ModelSkeleton(factory="a:b", kwargs={}, layers=renamed)
    with pytest.raises(PlanError, match="its layer head is tail"):
        check(job, skeleton=other)


def test_other_devices_are_refused_with_the_difference() -> None:
    plan, job, _ = matching()
    other = plan.hardware.devices[1].model_copy(update={"name": "older GPU"})
    with pytest.raises(PlanError, match="rank 1 is older GPU, planned GPU"):
        check(job, devices=(plan.hardware.devices[0], other))
    with pytest.raises(PlanError, match="a plan for 2 workers, the job has 4"):
        check(job, num_workers=4)


def test_ranks_have_the_factor_of_their_slowest_replica_and_noise_has_none() -> None:
    base = plan_file().hardware
    devices = [base.devices[0].model_copy(update={"rank": r}) for r in range(4)]
    speeds = (1.0, 1.0, 1.6, 1.04)
    slow = [d.model_copy(update={"factor": f}) for d, f in zip(devices, speeds, strict=True)]
    hardware = base.model_copy(update={"devices": tuple(slow)})
    assert rank_factors(hardware, ranks=2) == (1.6, 1.04)
    assert rank_factors(base, ranks=2) == ()


def test_differences_of_two_plans_are_listed() -> None:
    first = predicted(plan_file())
    assert list(plan_differences(first, first)) == []
    stages = (
        first.stages[0].model_copy(update={"last": "blocks.1"}),
        first.stages[1].model_copy(update={"first": "blocks.2"}),
    )
    second = predicted(plan_file(stages=stages))
    found = {what: (old, new) for what, old, new in plan_differences(first, second)}
    assert found["stage 0"] == ("embed .. blocks.0", "embed .. blocks.1")
    assert "predicted step" in found
    assert "hardware" not in found


def busy(plan: PlanFile, *, cores: int | None, threads: int = 1) -> PlanFile:
    background = (BackgroundSection(host="one", processes=0.06, threads=0.03),)
    hardware = plan.hardware.model_copy(
        update={"background": background, "shared_cores": cores}
    )
    model = plan.model.model_copy(update={"threads": threads})
    return plan.model_copy(update={"hardware": hardware, "model": model})


def test_what_runs_beside_the_training_is_read_back_and_makes_steps_on_shared_cores_longer() -> (
    None
):
    file = busy(plan_file(), cores=1)
    assert read_plan_file(write_plan_file(file), source="plan.yaml") == file
    hardware = plan_file().hardware.model_copy(update={"shared_cores": 1})
    quiet = predicted(plan_file(hardware=hardware))
    assert step_ms(predicted(file)) > 1.09 * step_ms(quiet)
    (line,) = plan_differences(quiet, file)
    assert line == ("cores taken beside the training", "not measured", "0.090 of one")


def test_cores_taken_beside_the_training_are_counted_in_places_of_workers() -> None:
    costs = busy(plan_file(), cores=2, threads=3).costs()
    assert costs.background_processes == pytest.approx(0.02)
    assert costs.background_threads == pytest.approx(0.01)
    apart = busy(plan_file(), cores=None).costs()  # workers leave cores for it
    assert (apart.background_processes, apart.background_threads) == (0.0, 0.0)


def step_ms(plan: PlanFile) -> float:
    assert plan.predicted is not None
    assert plan.predicted.step_ms is not None
    return plan.predicted.step_ms


def test_layers_with_routers_are_written_and_their_counts_priced() -> None:
    plain = plan_file()
    model = plain.model.model_copy(update={"routers": (LAYERS[1],)})
    routed = plain.model_copy(update={"model": model})
    again = read_plan_file(write_plan_file(routed), source="plan.yaml")
    assert again.costs().counted == (1,)
    assert plain.costs().counted == ()
