"""From measured sections to a whole plan file: the stages, the order, the predicted step. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepopt.clock import utc_now
from deepopt.config import JobConfig
from deepopt.planner.decide import Planned, make_plan
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan_file import (
    FORMAT,
    PipelineSection,
    PlanFile,
    StageSection,
)
from deepopt.planner.prediction import cores_of_replica, step_of
from deepopt.planner.profile import (
    MEGABYTE,
    HardwareSection,
    LayerSection,
    ModelSection,
    PredictedSection,
    Source,
)
from deepopt.planner.rank_memory import rank_bytes
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.schedule.bound import lower_bound_s
from deepopt.schedule.simulate import Timeline, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a plan file is made from.

    Args:
        source: where the figures are from.
        model: what they are of.
        hardware: what they were measured on.
        layers: in chain order.
        basis: what figures that nobody measured rest on.
    """

    source: Source
    model: ModelSection
    hardware: HardwareSection
    layers: tuple[LayerSection, ...]
    basis: str = ""


def make_plan_file(measured: Measured, *, job: JobConfig, skeleton: ModelSkeleton) -> PlanFile:
    """Decide the plan of a job and say what it will take.

    Args:
        measured: costs of layers and links.
        job: the resolved job; what it leaves open is decided.
        skeleton: its model.

    Raises:
        PlanError: nothing fits.
    """
    hardware = measured.hardware
    workers = len(hardware.devices)
    ranks = workers // job.parallel.data
    # Not decided yet: the costs need a pipeline to stand in.
    draft = PlanFile.model_construct(
        source=measured.source,
        model=measured.model,
        hardware=hardware,
        layers=measured.layers,
        pipeline=PipelineSection.model_construct(ranks=max(1, ranks)),
    )
    planned = make_plan(
        job,
        skeleton,
        num_workers=workers,
        plan_id=1,
        costs=draft.costs(),
        cores=hardware.shared_cores,
    )
    return predicted(_written(measured, planned))


def _written(measured: Measured, planned: Planned) -> PlanFile:
    plan = planned.plan
    placement = plan.make_placement()
    names = plan.layer_names
    edges = (*plan.boundaries, len(names))
    orders: tuple[tuple[str, ...], ...] = ()
    if plan.orders:
        orders = tuple(
            tuple(" ".join(map(str, row)) for row in schedule.actions)
            for schedule in planned.schedules
        )
    return PlanFile(
        format=FORMAT,
        made=utc_now(),
        source=measured.source,
        basis=measured.basis,
        model=measured.model,
        hardware=measured.hardware,
        pipeline=PipelineSection(
            ranks=plan.pipeline_size,
            replicas=plan.data_size,
            placement=plan.placement,
            schedule=planned.schedules[0].name if orders else plan.schedule,
            microbatches=plan.num_microbatches,
            groups=plan.num_groups,
            order=plan.order,
            recompute=None
            if plan.recompute is None
            else tuple(names[layer] for layer in plan.recompute),
        ),
        stages=tuple(
            StageSection(
                first=names[edges[stage]],
                last=names[edges[stage + 1] - 1],
                ranks=placement.copies_of(stage),
            )
            for stage in range(plan.num_stages)
        ),
        layers=measured.layers,
        orders=orders,
    )


def predicted(plan_file: PlanFile) -> PlanFile:
    """The same plan file with what its costs and its order say of a step.

    Args:
        plan_file: what it says so far does not matter.
    """
    costs = plan_file.costs()
    plan, schedules = plan_file.plan(plan_id=1), plan_file.schedules()
    cores = cores_of_replica(plan_file.hardware.shared_cores, plan)
    shares = [times.spread / 2 for times, _ in plan_file.resolved()]

    def step(table_costs: LayerCosts) -> tuple[float, float]:
        table = plan.stage_costs(table_costs)
        return max(step_of(own, table, cores=cores, overlap=False) for own in schedules)

    step_s, bubble = step(costs)
    warm_s, _ = step(costs.warming_up(1.0))
    gap = None
    if cores is None or cores >= plan.pipeline_size:  # then nobody waits for a core
        bound = lower_bound_s(
            plan.make_placement(),
            directions=schedules[0].directions,
            costs=plan.stage_costs(costs),
        )
        gap = round(max(0.0, step_s / bound - 1), 4) if bound > 0 else None
    section = PredictedSection(
        step_ms=round(step_s * 1e3, 4),
        range_ms=(
            round(step(_scaled(costs, [max(0.0, 1 - share) for share in shares]))[0] * 1e3, 4),
            round(step(_scaled(costs, [1 + share for share in shares]))[0] * 1e3, 4),
        ),
        warm_up_ms=round(max(0.0, warm_s - step_s) * 1e3, 4),
        bubble=round(bubble, 4),
        gap=gap,
        stage_ms=tuple(
            round(seconds * 1e3, 4)
            for seconds in costs.per_stage(costs.work_s, plan.boundaries)
        ),
        memory_mb=tuple(
            round(size / MEGABYTE, 3) for size in rank_bytes(costs, plan, schedules[0])
        ),
    )
    return plan_file.model_copy(update={"predicted": section})


def timeline_of(plan_file: PlanFile) -> Timeline:
    """The step of the first replica in time, for drawing: one step from its first action on.

    Args:
        plan_file: stages, order and costs.
    """
    plan = plan_file.plan(plan_id=1)
    return simulate(
        plan_file.schedules()[0],
        plan.stage_costs(plan_file.costs()),
        cores=cores_of_replica(plan_file.hardware.shared_cores, plan),
    )


def _scaled(costs: LayerCosts, shares: list[float]) -> LayerCosts:
    """Costs with the compute of each layer multiplied by a factor of its own."""

    def times(figures: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(map(float.__mul__, figures, shares)) if figures else ()

    return replace(
        costs,
        forward_s=times(costs.forward_s),
        input_s=times(costs.input_s),
        weight_s=times(costs.weight_s),
        prepare_s=times(costs.prepare_s),
    )
