"""A plan that is tried on emulated devices: found, run, and put beside its prediction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepopt.config import JobConfig
from deepopt.errors import InputError
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import COMPUTE_OPS, Schedule
from deepopt.schedule.simulate import Timeline, simulate
from deepopt.worker.rehearsal import RehearsalGroup, Rehearsed, stand_in

_EMULATED = "worker.device=emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is to be tried.

    Args:
        job: its `emulation` section says what everything takes.
        plan: who holds what.
        schedules: the order of each replica.
        timelines: of each replica, as simulated.
    """

    job: JobConfig
    plan: Plan
    schedules: tuple[Schedule, ...]
    timelines: tuple[Timeline, ...]


def find_trial(source: Path, *, workers: int | None, overrides: Sequence[str]) -> Trial:
    """The plan of a run directory, or the one that a job file gets on emulated devices.

    Args:
        source: either of them.
        workers: of a job file; None: as the job says.
        overrides: `KEY=VALUE` each.

    Raises:
        DeepoptError: neither, or it cannot be planned.
    """
    from deepopt.job_file import load_job

    wanted = [*overrides, _EMULATED]
    if source.is_dir():
        from deepopt.launch.run_view import open_run
        from deepopt.planner.orders import load_schedule
        from deepopt.telemetry.files import read_json

        if workers is not None:
            raise InputError(
                f"--workers {workers} does not fit the plan of {source}",
                remedy="leave it out, or try the job file",
            )
        run = open_run(source)
        job = load_job(run.job, wanted)
        plan = Plan.from_json(read_json(run.plan))
        schedules = tuple(
            load_schedule(plan, data_index=index, folder=run.schedules)
            for index in range(plan.data_size)
        )
    else:
        from deepopt.launch.preparation import import_from, prepare, with_absolute_paths

        if workers is not None:
            wanted.append(f"worker.count={workers}")
        asked = with_absolute_paths(load_job(source, wanted))
        import_from([Path.cwd()], job=asked)
        prepared = prepare(asked, plan_id=1)
        job, plan, schedules = prepared.job, prepared.plan, prepared.planned.schedules
    costs = plan.stage_costs(
        plan.costs_of(emulated_costs(job, num_layers=len(plan.layer_names)))
    )
    timelines = tuple(simulate(schedule, costs) for schedule in schedules)
    return Trial(job=job, plan=plan, schedules=tuple(schedules), timelines=timelines)


def run_trial(trial: Trial, *, steps: int) -> Rehearsed:
    """Run a plan in processes of this host, after one step that does not count.

    Args:
        trial: what to run.
        steps: to measure.

    Raises:
        DeepoptError: a step failed.
    """
    num_layers = len(trial.plan.layer_names)
    names = tuple(f"layers.{index}" for index in range(num_layers))
    with RehearsalGroup(
        trial.plan.world_size, timeout_s=trial.job.faults.step_timeout_s
    ) as group:
        group.load(
            "trial",
            job=stand_in(trial.job, num_layers=num_layers),
            plan=replace(trial.plan, layer_names=names),
            schedules=trial.schedules,
        )
        group.run("trial", num_steps=1)
        return group.run("trial", num_steps=steps)


def trial_json(trial: Trial, found: Rehearsed) -> dict[str, Any]:
    """Prediction and measurement side by side, JSON-ready.

    Args:
        trial: what was run.
        found: what was measured.
    """
    plan = trial.plan
    predicted_s = max(timeline.makespan_s for timeline in trial.timelines)
    predicted_busy_s = [
        sum(s.end_s - s.start_s for s in timeline.spans[rank] if s.action.op in COMPUTE_OPS)
        for timeline in trial.timelines
        for rank in range(plan.pipeline_size)
    ]
    step_s = statistics.median(found.step_s)
    measured_busy_s = [rank.busy_s for rank in found.ranks]
    overruns = found.overruns
    return {
        "plan": plan.to_json(),
        "predicted": {"step_s": predicted_s, "bubble": _bubble(predicted_busy_s, predicted_s)},
        "measured": {
            "step_s": step_s,
            "steps_s": list(found.step_s),
            "bubble": _bubble(measured_busy_s, step_s),
        },
        "ranks": [
            {
                "rank": rank,
                "stages": list(plan.held_stages(rank)),
                "predicted_busy_s": predicted_busy_s[rank],
                "measured_busy_s": measured_busy_s[rank],
            }
            for rank in range(plan.world_size)
        ],
        "emulated": {
            "operations": overruns.num_operations,
            "overran": overruns.num_overran,
            "late_s": overruns.late_s,
        },
    }


def _bubble(busy_s: Sequence[float], step_s: float) -> float:
    return 1 - sum(busy_s) / (len(busy_s) * step_s)
