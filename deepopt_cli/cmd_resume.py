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
    write_plan,
)
from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import reports_errors, say, say_json

if TYPE_CHECKING:
    from deepopt.planner.skeleton import ModelSkeleton
    from deepopt.run_directory import RunDirectory

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
    json: JsonOption = False,
    detach: DetachOption = False,
) -> None:
    """Go on with a job from its newest checkpoint.

    It may have been stopped, have failed or died, or be finished and train further. Any number
    of workers will do: the losses are those of an unbroken run.

    \b
    Examples:
      deepopt resume runs/NAME
      deepopt resume runs/NAME --workers 2
      deepopt resume runs/NAME --steps 200 --set pipeline.placement=line
    """
    from deepopt.job_file import load_job
    from deepopt.planner.plan import Plan
    from deepopt.planner.skeleton import ModelSkeleton
    from deepopt.telemetry.files import read_json
    from deepopt_cli.preparation import import_from, prepare, with_absolute_paths
    from deepopt_cli.run_view import open_run, read_status

    warn_of_namesake()
    run = open_run(run_dir)
    _refuse_incomplete(run, run_dir)
    _refuse_alive(run, run_dir)
    wanted = [*(overrides or ())]
    _refuse_new_numbers(wanted)
    for key, value in (("worker.count", workers), ("training.steps", steps)):
        if value is not None:
            wanted.append(f"{key}={json_text.dumps(value)}")
    job = with_absolute_paths(load_job(run.job, wanted))
    status = read_status(run) or {}
    if _is_done(status, last_step=job.training.steps):
        _say_done(status, run=run, shown_as=run_dir, steps=job.training.steps, json=json)
        return
    import_from([*_launch_roots(run), Path.cwd()], job=job)
    saved_plan = Plan.from_json(read_json(run.plan))
    saved_model = ModelSkeleton.from_json(read_json(run.model))
    prepared = prepare(job, plan_id=saved_plan.plan_id + 1, run=run)
    _refuse_other_model(saved_model, prepared.skeleton, shown_as=run_dir)
    if not json:
        show_start(prepared, shown_as=run_dir)
    write_plan(run, prepared)

    from deepopt_cli import attend

    if detach:
        code = attend.detach(run, shown_as=run_dir, json=json, fresh=False)
    else:
        code = attend.attend(run, job=prepared.job, shown_as=run_dir, json=json, fresh=False)
    raise typer.Exit(code)


def _launch_roots(run: RunDirectory) -> list[Path]:
    """Where the job was launched; nothing for a run that does not say."""
    from deepopt.telemetry.files import read_json

    if not run.launch.is_file():
        return []
    root = read_json(run.launch).get("import_root")
    return [Path(root)] if isinstance(root, str) else []


def _refuse_incomplete(run: RunDirectory, shown_as: Path) -> None:
    from deepopt.errors import RunDirectoryError

    missing = [path.name for path in (run.model, run.plan) if not path.is_file()]
    if missing:
        raise RunDirectoryError(
            f"run directory {shown_as} lacks {' and '.join(missing)}",
            remedy=f"it was damaged; start anew with: deepopt launch {shown_as / run.job.name}",
        )


def _refuse_alive(run: RunDirectory, shown_as: Path) -> None:
    from deepopt.errors import RunDirectoryError
    from deepopt_cli.run_view import ENDED, read_status, read_supervisor

    supervisor = read_supervisor(run)
    if supervisor is None:
        return
    alive = supervisor.lives()
    state = (read_status(run) or {}).get("state", "starting")
    if alive:
        raise RunDirectoryError(
            f"the job in {shown_as} is {state}: supervisor pid {supervisor.pid} lives",
            remedy=f"watch it with deepopt status {shown_as} or deepopt logs -f {shown_as}, "
            f"end it with deepopt stop {shown_as}",
        )
    if alive is None and state not in ENDED:
        raise RunDirectoryError(
            f"the job in {shown_as} is recorded as {state} on host {supervisor.host}, which "
            "cannot be looked at from here",
            remedy=f"resume on {supervisor.host}; if that host is gone, remove {run.supervisor}",
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


def _refuse_other_model(saved: ModelSkeleton, now: ModelSkeleton, *, shown_as: Path) -> None:
    from deepopt.errors import RunDirectoryError

    if saved.fingerprint() == now.fingerprint():
        return
    raise RunDirectoryError(
        f"the model is not the one that {shown_as} was launched with: "
        f"{_first_difference(saved, now)}",
        remedy=f"restore the code of {saved.factory}, or launch a new job",
    )


def _first_difference(saved: ModelSkeleton, now: ModelSkeleton) -> str:
    if len(saved.layers) != len(now.layers):
        return f"it had {len(saved.layers)} layers and has {len(now.layers)}"
    for before, after in zip(saved.layers, now.layers, strict=True):
        if before.name != after.name:
            return f"layer {before.name} is now {after.name}"
        old = {p.name: p for p in before.parameters}
        new = {p.name: p for p in after.parameters}
        for name in [*old, *new]:
            if name not in new or name not in old:
                return f"parameter {name} is {'gone' if name in old else 'new'}"
            if old[name].shape != new[name].shape:
                return (
                    f"{name} had shape {list(old[name].shape)} and has {list(new[name].shape)}"
                )
            if old[name].tied_to != new[name].tied_to:
                return f"{name} was tied to {old[name].tied_to}, is tied to {new[name].tied_to}"
    return "parameters stand in another order"
