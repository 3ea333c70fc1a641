"""The closing report: how the job went, and the step time that its own figures predict.

Each worker measures how long its operations keep its device busy; the simulator puts these times
into the schedule's order. What the prediction lacks: the loading of data, the exchange of norms,
and everything else on the machine.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepopt.head.expert_report import expert_report
from deepopt.head.prediction_report import prediction_fields
from deepopt.planner.choose import yardstick
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.estimate import estimated_costs
from deepopt.planner.host_cores import places_shared
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.measured import measured_costs, stage_times
from deepopt.planner.orders import load_schedule
from deepopt.planner.plan import Plan
from deepopt.planner.sketch import Pipeline
from deepopt.schedule.ir import Op
from deepopt.schedule.simulate import CostTable, Timeline, simulate
from deepopt.telemetry.files import read_json_lines

if TYPE_CHECKING:
    from deepopt.head.record import JobRecord

WARM_UP_STEPS = 2  # left out of the median: caches and allocators fill


def cost_table(
    op_times_s: Iterable[Mapping[str, float]],
    *,
    plan: Plan,
    update_s: float,
    reduce_s: float,
) -> CostTable | None:
    """What the workers measured, as the simulator wants it.

    Args:
        op_times_s: of each worker, seconds by `STAGE OP`, for example `2F`.
        plan: who holds which layers.
        update_s: of one worker.
        reduce_s: of one worker.

    Returns:
        None when a stage was not measured.
    """
    found = stage_times(op_times_s)
    stages = range(plan.num_stages)

    forward, inputs, weights, prepares = [], [], [], []
    for stage in stages:
        if (stage, Op.F) not in found:
            return None
        forward.append(found[stage, Op.F])
        if (stage, Op.I) in found and (stage, Op.W) in found:
            inputs.append(found[stage, Op.I])
            weights.append(found[stage, Op.W])
        elif (stage, Op.B) in found:  # the schedule knows no parts; their sum counts
            inputs.append(found[stage, Op.B])
            weights.append(0.0)
        else:
            return None
        prepares.append(found.get((stage, Op.R), 0.0))
    held = max(len(plan.held_stages(rank)) for rank in range(plan.pipeline_size))
    return CostTable(
        forward_s=tuple(forward),
        input_s=tuple(inputs),
        weight_s=tuple(weights),
        prepare_s=tuple(prepares),
        reduce_s=(reduce_s,) * plan.num_stages,
        update_s=(update_s / held,) * plan.num_stages,
    )


def predict(plan: Plan, costs: CostTable, *, cores: int | None, schedules: Path) -> Timeline:
    """The step of the plan's first replica in time.

    Args:
        plan: who holds which layers.
        costs: seconds of each operation.
        cores: host cores that the workers share; None where each has a device of its own.
        schedules: folder of searched orders.

    Raises:
        PlanError: a searched order cannot be read.
    """
    schedule = load_schedule(plan, data_index=0, folder=schedules)
    if cores is not None:  # the other replicas work at the same time
        cores = max(1, cores // plan.data_size)
    return simulate(schedule, costs, cores=cores)


def shared_cores(devices: Sequence[str], hosts: Sequence[str], *, threads: int) -> int | None:
    """Cores that the workers share; None when each has a device, or cores of its own and some are left.

    Args:
        devices: of each worker, for example `cpu`.
        hosts: of each worker.
        threads: `worker.threads`.
    """
    if len(set(hosts)) != 1 or any(device != "cpu" for device in devices):
        return None
    return places_shared(len(devices), threads=threads, cores=len(os.sched_getaffinity(0)))


def make_report(record: JobRecord) -> dict[str, Any]:
    """The content of `report.json`, when the job has ended."""
    progress, pace, generation = record.progress, record.pace, record.generation
    steady = pace.step_s[WARM_UP_STEPS:] or pace.step_s
    measured = pace.figures[WARM_UP_STEPS:] or pace.figures
    outcome = record.outcome
    report: dict[str, Any] = {
        "job_id": record.identity.job_id,
        "state": None if outcome is None else str(outcome.state),
        "step": progress.step,
        "checkpoint_step": progress.checkpoint_step,
        "restarts": progress.restarts,
        "placement": str(record.plan.placement),
        "schedule": record.plan.schedule,
        "loss": None if progress.report is None else progress.report.loss,
        "measured_step_s": _median(steady),
        "measured_bubble": _median(figures.bubble for figures in measured),
        "tokens_per_s": _median(figures.tokens_per_s for figures in measured),
        "tokens_per_s_per_worker": _median(f.tokens_per_s_per_worker for f in measured),
        "mfu": _median(figures.mfu for figures in measured if figures.mfu is not None),
        "simulated_step_s": None,
        "simulated_bubble": None,
        "shared_cores": None,
        "simulated_1f1b_step_s": None,
        "gain_over_1f1b": None,
        "update_s": statistics.median(pace.update_s) if pace.update_s else None,
        "emulated": None,
        "experts": expert_report(
            read_json_lines(record.run.metrics),
            read_json_lines(record.run.expert_loads),
            forecast=record.load_forecast.all_shares(),
            errors=record.load_forecast.errors(),
        ),
        "predicted_step_s": None,
        "prediction_error": None,
        "prediction_causes": [],
        "op_times_s": {},
        "setup_s": {},
    }
    if generation is None:
        return report
    ready = [member.ready for member in generation.members if member.ready is not None]
    report["setup_s"] = {str(word.sender.rank): dict(word.setup_s) for word in ready}
    ended = [member.ended for member in generation.members if member.ended is not None]
    report["op_times_s"] = {str(word.sender.rank): dict(word.op_times_s) for word in ended}
    overruns = [word.overruns for word in ended if word.overruns is not None]
    if overruns:
        report["emulated"] = {
            "operations": sum(one.num_operations for one in overruns),
            "overran": sum(one.num_overran for one in overruns),
            "late_s": sum(one.late_s for one in overruns),
        }
    costs: CostTable | None
    if overruns:  # devices and links take what the job says
        plan = record.plan
        costs = plan.stage_costs(
            plan.costs_of(emulated_costs(record.job, num_layers=len(plan.layer_names)))
        )
    else:
        costs = cost_table(
            [word.op_times_s for word in ended],
            plan=record.plan,
            update_s=statistics.median(pace.update_s) if pace.update_s else 0.0,
            reduce_s=statistics.median(pace.reduce_s) if pace.reduce_s else 0.0,
        )
    if costs is not None:
        cores = shared_cores(
            [word.device for word in ready],
            [word.host for word in ready],
            threads=record.job.worker.threads,
        )
        timeline = predict(record.plan, costs, cores=cores, schedules=record.run.schedules)
        report |= _against_1f1b(record, report, timeline, cores=cores)
        report["simulated_step_s"] = timeline.makespan_s
        report["simulated_bubble"] = timeline.bubble
        report["shared_cores"] = cores
    report |= prediction_fields(
        record.prediction,
        plan=record.plan,
        run=record.run,
        step_s=pace.step_s,
        warm_up=pace.warm_up,
        num_steps=pace.num_steps,
        warm_up_steps=pace.num_warm_up_steps,
        hosts=[word.host for word in ready],
        op_times_s=[word.op_times_s for word in ended],
        parts_s=[word.parts_s for word in ended],
        late_s=[one.late_s for one in overruns],
        threads=record.job.worker.threads,
    )
    return report


def _against_1f1b(
    record: JobRecord, report: Mapping[str, Any], timeline: Timeline, *, cores: int | None
) -> dict[str, float]:
    """What plain 1F1B would have taken in the costs of this run: simulated, not run."""
    plan = record.plan
    prior = plan.costs_of(estimated_costs(record.job, record.skeleton))
    costs: LayerCosts | None = prior
    if report["emulated"] is None:
        costs = measured_costs(
            report["op_times_s"].values(),
            plan=plan,
            prior=prior,
            update_s=report["update_s"] or 0.0,
        )
    if costs is None or timeline.makespan_s <= 0:
        return {}
    pipeline = Pipeline(
        num_ranks=plan.pipeline_size,
        replicas=tuple(
            tuple(b - a for a, b in plan.replica_groups(d)) for d in range(plan.data_size)
        ),
        layers=costs,
        cores=cores,
    )
    plain = yardstick(pipeline)
    if plain is None:
        return {}
    seconds = plain.step_s
    return {
        "simulated_1f1b_step_s": seconds,
        "gain_over_1f1b": seconds / timeline.makespan_s,
    }


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None
