"""Predicted against measured: the step that the plan was launched with, and what the run took instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from deepopt.errors import RunDirectoryError
from deepopt.planner.measured import stage_times
from deepopt.planner.orders import load_schedule
from deepopt.planner.plan import Plan
from deepopt.planner.prediction import MeasuredRun, Prediction, causes
from deepopt.run_directory import RunDirectory
from deepopt.schedule.ir import Op
from deepopt.telemetry.files import read_json

WARM_UP_STEPS = 2  # left out of the median: caches and allocators fill


def load_prediction(run: RunDirectory, plan: Plan) -> Prediction | None:
    """What was predicted of a plan; None where nothing was, or of another plan.

    Args:
        run: the run directory.
        plan: what runs.
    """
    try:
        content = read_json(run.prediction)
        if content["plan"] != plan.fingerprint():
            return None
        return Prediction.from_json(content)
    except (RunDirectoryError, KeyError, TypeError):
        return None


def prediction_error(
    prediction: Prediction | None, step_s: Sequence[float], *, warm_up: Sequence[float] = ()
) -> float | None:
    """The median of measured / predicted - 1 over the steps; None before there is one.

    A step in which routers warm up is compared with what was predicted for as many of them: of a short
    training all steps may be such.

    Args:
        prediction: of the step.
        step_s: of each step of this launch, or of the last ones.
        warm_up: of each of these, the share of routers that warmed up in it; none: 0.
    """
    steady = step_s[WARM_UP_STEPS:]
    if prediction is None or not steady or prediction.step_s <= 0:
        return None
    shares = [*warm_up, *[0.0] * (len(step_s) - len(warm_up))][WARM_UP_STEPS:]
    rows = zip(steady, shares, strict=True)
    return median(own / prediction.in_warm_up(share) for own, share in rows) - 1


def prediction_fields(
    prediction: Prediction | None,
    *,
    plan: Plan,
    run: RunDirectory,
    step_s: Sequence[float],
    warm_up: Sequence[float],
    num_steps: int,
    warm_up_steps: int,
    hosts: Sequence[str],
    op_times_s: Sequence[Mapping[str, float]],
    parts_s: Sequence[Mapping[str, float]],
    late_s: Sequence[float] = (),
    threads: int = 1,
) -> dict[str, Any]:
    """The part of the closing report that compares.

    Args:
        prediction: of the step; None where nothing was predicted.
        plan: what ran.
        run: the run directory, for searched orders.
        step_s: of each step of this launch, or of the last ones.
        warm_up: of each of these, the share of routers that warmed up in it.
        num_steps: of this launch.
        warm_up_steps: of these, those in which any router warmed up.
        hosts: of each worker.
        op_times_s: of each worker, seconds by `STAGE OP`.
        parts_s: of each worker, seconds of a step by part.
        late_s: of each emulated device, by how much its operations overran, in all steps.
        threads: CPU threads of a worker.
    """
    error = prediction_error(prediction, step_s, warm_up=warm_up)
    if prediction is None or error is None:
        return {}
    measured = MeasuredRun(
        step_s=median(step_s[WARM_UP_STEPS:]),
        mean_step_s=fmean(step_s[WARM_UP_STEPS:]),
        warm_up=median(warm_up[WARM_UP_STEPS:]) if warm_up[WARM_UP_STEPS:] else 0.0,
        op_times_s=op_times_s,
        parts_s=with_others(parts_s, hosts),
        late_s=max(late_s, default=0.0) / num_steps,
        threads=threads,
    )
    schedule = load_schedule(plan, data_index=0, folder=run.schedules)
    found = causes(prediction, measured, plan=plan, schedule=schedule)
    return {
        "predicted_step_s": prediction.step_s,
        "predicted_warm_up_s": prediction.warm_up_s,
        "warm_up_steps": warm_up_steps,
        "warm_up_share": measured.warm_up,
        "predicted_bubble": prediction.bubble,
        "predicted_memory_bytes": list(prediction.memory_bytes),
        "prediction_error": error,
        "prediction_causes": [{"what": one.what, "share": one.share} for one in found],
        "predicted_stages": _stages(prediction, stage_times(op_times_s)),
        "step_parts_s": [dict(parts) for parts in measured.parts_s],
    }


def with_others(
    parts_s: Sequence[Mapping[str, float]], hosts: Sequence[str]
) -> list[dict[str, float]]:
    """Parts with the CPU time that processes other than the workers used on each worker's host.

    Args:
        parts_s: of each worker; `host_cpu_s` of all processes and `own_cpu_s` of itself, a step.
        hosts: of each worker.
    """
    own: dict[str, float] = {}
    for parts, host in zip(parts_s, hosts, strict=False):
        own[host] = own.get(host, 0.0) + parts.get("own_cpu_s", 0.0)
    found = []
    for parts, host in zip(parts_s, hosts, strict=False):
        others = parts.get("host_cpu_s", own[host]) - own[host]
        found.append({**parts, "others_cpu_s": max(0.0, others)})
    return found


def _stages(
    prediction: Prediction, times: Mapping[tuple[int, Op], float]
) -> list[dict[str, Any]]:
    """Predicted and measured compute of each stage a micro-batch."""
    rows = []
    for stage, predicted in enumerate(prediction.stage_s):
        apart = (stage, Op.I) in times and (stage, Op.W) in times
        ops = (Op.F, Op.I, Op.W, Op.R) if apart else (Op.F, Op.B, Op.R)
        known = [times[stage, op] for op in ops if (stage, op) in times]
        rows.append(
            {
                "stage": stage,
                "predicted_s": sum(predicted),
                "measured_s": sum(known) if known else None,
            }
        )
    return rows
