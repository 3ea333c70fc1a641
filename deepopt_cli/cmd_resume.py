"""`deepopt resume`: go on with a job from the newest checkpoint of its run directory."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepopt_cli.cmd_launch import (
    DetachOption,
    JsonOption,
    StepsOption,
    show_start,
    warn_of_namesake,
)
from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import reports_errors, say, say_json, tell

if TYPE_CHECKING:
    from deepopt.launch.run_view import Supervisor
    from deepopt.run_directory import RunDirectory

PLANNED_SECTIONS = {"pipeline", "parallel", "worker", "cluster"}  # a plan depends on them
# What may change between two launches of one job: nothing that decides its numbers.
FREE_SECTIONS = ("pipeline", "parallel", "worker", "cluster", "logging", "faults", "checkpoint")


@reports_errors
def resume(
    run_dir: RunArgument,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of workers. [default: as before]"),
    ] = None,
    steps: StepsOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help=f"Change a key of {', '.join(FREE_SECTIONS)}; repeatable.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN.yaml",
            help="Stages, order and costs of `deepopt profile`. [default: those it was launched "
            "with, while they fit]",
        ),
    ] = None,
    json: JsonOption = False,
    detach: DetachOption = False,
) -> None:
    """Go on with a job from its newest checkpoint.

    It may have been stopped, have failed or died, or be finished and train further. Any number
    of workers will do: the losses are those of an unbroken run. Stages and order come from --plan,
    else from the plan file that it was launched with unless workers or pipeline change, else they
    are decided anew. What the job file itself says of stages and order still holds, and is named where
    it does not fit any more. A job that still runs is joined: its output is shown, nothing is started. When
    only its head has died, its supervisor replaces that by itself, and the workers go on.

    \b
    Examples:
      deepopt resume runs/NAME
      deepopt resume runs/NAME --workers 2
      deepopt resume runs/NAME --steps 200 --set pipeline.placement=line
      deepopt resume runs/NAME --plan plan.yaml
    """
    from deepopt.errors import PlanError
    from deepopt.job_file import load_job
    from deepopt.launch.preparation import import_from, prepare, with_absolute_paths
    from deepopt.launch.resume_checks import (
        find_alive,
        refuse_incomplete,
        refuse_other_model,
        say_what_to_free,
    )
    from deepopt.launch.run_files import launch_roots, write_plan
    from deepopt.launch.run_view import open_run, read_status
    from deepopt.planner.plan import Plan
    from deepopt.planner.skeleton import ModelSkeleton
    from deepopt.telemetry.files import read_json

    warn_of_namesake()
    run = open_run(run_dir)
    refuse_incomplete(run, run_dir)
    wanted = [*(overrides or ())]
    _refuse_new_numbers(wanted)
    for key, value in (("worker.count", workers), ("training.steps", steps)):
        if value is not None:
            wanted.append(f"{key}={json_text.dumps(value)}")
    changes = [*wanted, *(() if plan is None else (f"--plan {plan}",))]
    if (supervisor := find_alive(run, run_dir, changes=changes)) is not None:
        raise typer.Exit(_join(run, supervisor, shown_as=run_dir, json=json, detach=detach))
    job = with_absolute_paths(load_job(run.job, wanted))
    status = read_status(run) or {}
    if _is_done(status, last_step=job.training.steps):
        _say_done(status, run=run, shown_as=run_dir, steps=job.training.steps, json=json)
        return
    import_from([*launch_roots(run), Path.cwd()], job=job)
    saved_plan = Plan.from_json(read_json(run.plan))
    saved_model = ModelSkeleton.from_json(read_json(run.model))
    plan_id = saved_plan.plan_id + 1
    if workers is None and saved_plan.world_size < (job.worker.count or 0):
        tell(
            f"note: the job had shrunk to {saved_plan.world_size} of {job.worker.count} workers, and "
            f"asks for all of them again; --workers {saved_plan.world_size}: for as many as it had"
        )
    prepared = None
    if plan is None and run.plan_file.is_file() and not _plans_anew(wanted):
        try:
            prepared = prepare(job, plan_id=plan_id, run=run, plan_file=run.plan_file)
        except PlanError as error:
            tell(f"note: planned anew: {error.message}")
    if prepared is None:
        try:
            prepared = prepare(job, plan_id=plan_id, run=run, plan_file=plan)
        except PlanError as error:
            if plan is not None:  # the error is about that file
                raise
            raise say_what_to_free(
                error, job, skeleton=saved_model, overrides=wanted, shown_as=run_dir
            ) from error
    refuse_other_model(saved_model, prepared.skeleton, shown_as=run_dir)
    if not json:
        show_start(prepared, shown_as=run_dir)
    write_plan(run, prepared)

    from deepopt_cli import attend

    if detach:
        code = attend.detach(run, shown_as=run_dir, json=json, fresh=False)
    else:
        code = attend.attend(run, job=prepared.job, shown_as=run_dir, json=json, fresh=False)
    raise typer.Exit(code)


def _join(
    run: RunDirectory, supervisor: Supervisor, *, shown_as: Path, json: bool, detach: bool
) -> int:
    """The job runs: show it, start nothing."""
    from deepopt.job_file import load_job
    from deepopt.launch.run_view import read_status
    from deepopt_cli import attend

    status = read_status(run) or {}
    if not json:
        say(
            f"the job runs: {status.get('state', 'starting')} at step {status.get('step', 0)}, "
            f"supervisor pid {supervisor.pid}; " + ("nothing to do" if detach else "joined it")
        )
    if detach:
        if json:
            say_json({**status, "supervisor_alive": True, "run_dir": str(run.root)})
        return 0
    return attend.attach(
        run, supervisor=supervisor, job=load_job(run.job), shown_as=shown_as, json=json
    )


def _refuse_new_numbers(overrides: Sequence[str]) -> None:
    from deepopt.errors import InputError

    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.split(".")[0] not in FREE_SECTIONS:
            raise InputError(
                f"--set {override}: resume cannot change {key}: the losses would not be those of "
                "one job",
                remedy=f"resume can change {', '.join(FREE_SECTIONS)}; for anything else launch a "
                "new job",
            )


def _plans_anew(overrides: Sequence[str]) -> bool:
    """Whether a change asks for other stages than those of the plan file so far."""
    keys = {override.partition("=")[0].strip().partition(".")[0] for override in overrides}
    return bool(keys & PLANNED_SECTIONS)


def _is_done(status: dict[str, Any], *, last_step: int) -> bool:
    """Whether there is nothing to do: finished as far as wanted, or trained beyond it."""
    step = int(status.get("step") or 0)
    saved = int(status.get("checkpoint_step") or 0)
    return saved > last_step or (status.get("state") == "finished" and step >= last_step)


def _say_done(
    status: dict[str, Any], *, run: RunDirectory, shown_as: Path, steps: int, json: bool
) -> None:
    if json:
        say_json({**status, "supervisor_alive": False, "run_dir": str(run.root)})
        return
    step = int(status.get("step") or 0)
    say(f"nothing to do: the job is {status.get('state')} at step {step}, asked for {steps}")
    say(f"train further with: deepopt resume {shown_as} --steps {2 * step}")
