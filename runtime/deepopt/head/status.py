"""The content of `status.json`, from what the head knows. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepopt.clock import utc_now
from deepopt.head.generation import Generation
from deepopt.head.measures import StepFigures
from deepopt.head.recovery import Blame
from deepopt.head.state import JobState
from deepopt.planner.plan import Plan
from deepopt.worker.messages import Failure, StepReport


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far the job is.

    Args:
        step: the last step done.
        reported: the last step whose figures are known; behind `step` until a new group tells them.
        checkpoint_step: step of the newest committed checkpoint; 0 for none.
        checkpoint_path: its folder; None for none.
        report: the last step's report; None before the first of this launch.
        figures: its figures.
        time_left_s: predicted seconds to the last step.
        prediction_error: median of measured / predicted - 1 over the last steps; None where nothing was
            predicted.
        warm_up_share: of the routers, those that warmed up in the last step; steps are compared with what is
            predicted for as many.
        restarts: generations formed after a loss, in this launch.
    """

    step: int = 0
    reported: int = 0
    checkpoint_step: int = 0
    checkpoint_path: str | None = None
    report: StepReport | None = None
    figures: StepFigures | None = None
    time_left_s: float | None = None
    prediction_error: float | None = None
    warm_up_share: float | None = None
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What does not change while a job runs.

    Args:
        job_id: the job.
        name: its name.
        last_step: run through this step.
        supervisor_pid: process id of the supervisor.
    """

    job_id: str
    name: str
    last_step: int
    supervisor_pid: int


def status_of(
    identity: Identity,
    *,
    state: JobState,
    plan: Plan,
    progress: Progress,
    generation: Generation | None,
    exit_code: int | None,
    error: Mapping[str, Any] | None,
    faults: Sequence[Mapping[str, Any]],
    now_s: float,
    warm_spares: int,
    workers_wanted: int,
) -> dict[str, Any]:
    """The job as it is now.

    Args:
        identity: what does not change.
        state: the job's state.
        plan: who holds which layers.
        progress: how far it is.
        generation: the workers; None before the first generation.
        exit_code: None while the job runs.
        error: what `error_of` made; None when nothing failed.
        faults: what `FaultLog` shows.
        now_s: the time on the head's monotonic clock.
        warm_spares: processes that can take a lost worker's place at once.
        workers_wanted: of the full job; fewer are there while it has shrunk.
    """
    report, figures = progress.report, progress.figures
    return {
        "job_id": identity.job_id,
        "name": identity.name,
        "state": str(state),
        "step": progress.step,
        "last_step": identity.last_step,
        "generation": 0 if generation is None else generation.number,
        "plan_id": plan.plan_id,
        "exit_code": exit_code,
        "error": error,
        "workers": [] if generation is None else _workers(generation, now_s=now_s),
        "evaluation": None if generation is None else _evaluation(generation),
        "loss": None if report is None else report.loss,
        "tokens_per_s": None if figures is None else figures.tokens_per_s,
        "tokens_per_s_per_worker": None if figures is None else figures.tokens_per_s_per_worker,
        "mfu": None if figures is None else figures.mfu,
        "eta_s": progress.time_left_s,
        "prediction_error": progress.prediction_error,
        "warm_up_share": progress.warm_up_share,
        "stage_busy": {}
        if figures is None
        else {str(rank): busy for rank, busy in enumerate(figures.stage_busy)},
        "bubble": None if figures is None else figures.bubble,
        "restarts": progress.restarts,
        "warm_spares": warm_spares,
        "workers_wanted": workers_wanted,
        "faults": list(faults),
        "checkpoint_step": progress.checkpoint_step,
        "placement": str(plan.placement),
        "schedule": plan.schedule,
        "updated_at": utc_now(),
        "supervisor_pid": identity.supervisor_pid,
    }


def _evaluation(generation: Generation) -> dict[str, int] | None:
    """How far the evaluation in work is, in micro-batches; each ends on one worker."""
    beats = [generation.liveness.last(m.sender.rank) for m in generation.members]
    found = [beat.evaluation for beat in beats if beat is not None and beat.evaluation]
    if not found:
        return None
    return {"begun": sum(begun for begun, _ in found), "total": found[0][1]}


def _workers(generation: Generation, *, now_s: float) -> list[dict[str, Any]]:
    suspects = generation.liveness.suspects()
    workers = []
    for member in generation.members:
        rank = member.sender.rank
        beat = generation.liveness.last(rank)
        workers.append(
            {
                "rank": rank,
                "pid": member.pid,
                "host": member.host,
                "stages": list(member.stages),
                "device": "" if member.ready is None else member.ready.device,
                "heartbeat_age_s": generation.liveness.age_s(rank, now_s=now_s),
                "step": generation.start_step if beat is None else beat.step,
                "action": "" if beat is None else beat.action,
                "state": member.state(suspect=rank in suspects),
            }
        )
    return workers


def error_of(
    message: str, *, remedy: str, blame: Blame | None, plan: Plan | None
) -> dict[str, Any]:
    """The `error` of `status.json`: the culprit first, the victims folded.

    Args:
        message: one line.
        remedy: the next step; may be empty.
        blame: who failed; None when no worker did.
        plan: tells the stages of the ranks.
    """
    return {
        "message": message,
        "remedy": remedy,
        "culprit": None if blame is None else failure_json(blame.culprit, plan=plan),
        "victims": []
        if blame is None
        else [failure_json(victim, plan=plan) for victim in blame.victims],
    }


def failure_json(failure: Failure, *, plan: Plan | None) -> dict[str, Any]:
    """A worker's failure for people and scripts."""
    rank = failure.sender.rank
    return {
        "rank": rank,
        "host": failure.host,
        "pid": failure.pid,
        "stages": [] if plan is None else list(plan.held_stages(rank)),
        "generation": failure.sender.generation,
        "kind": failure.kind,
        "cause": failure.cause,
        "step": failure.step,
        "action": failure.action,
        "message": failure.message,
        "traceback": failure.traceback,
    }
