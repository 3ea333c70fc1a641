"""`deepopt launch`: check a job, plan it, start it, stay with it."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepopt_cli.output import reports_errors, say, say_json, tell

if TYPE_CHECKING:
    from deepopt.launch.preparation import Prepared

WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Number of workers. [default: GPUs, or 4 without]"),
]
StepsOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Step to stop at.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="A JSON object a step, and the final status.")
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Start the job and leave it.")]


@reports_errors
def launch(
    job_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB.yaml | SCRIPT.py]",
            help="Job file; none: all defaults. Or a Python script that uses DeepTrainer.",
        ),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGUMENTS]", help="For the script.", show_default=False),
    ] = None,
    workers: WorkersOption = None,
    steps: StepsOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New run directory. [default: runs/NAME-DATE-ID]"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job; repeatable."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hosts to use, lines of `host slots=N`."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Running Ray cluster to join.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.yaml", help="Stages, order and costs of `deepopt profile`."),
    ] = None,
    spares: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Warm processes kept for lost workers."),
    ] = None,
    json: JsonOption = False,
    detach: DetachOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and start nothing.")
    ] = False,
) -> None:
    """Train a job. Without a job file, trains the built-in model on Python's own sources.

    A Python script runs as it is: what its DeepTrainers train goes to the cluster, the workers and with
    the keys that are named here, and its exit code is that of the launch.

    The first Ctrl-C stops the job after the step in work, with a checkpoint; the second kills it.

    \b
    Examples:
      deepopt launch
      deepopt launch job.yaml --workers 4 --set training.seed=1
      deepopt launch job.yaml --dry-run
      deepopt launch job.yaml --detach --run-dir runs/first
      deepopt launch job.yaml --spares 1
      deepopt launch job.yaml --hostfile hosts --json > metrics.jsonl
      deepopt launch job.yaml --plan plan.yaml
      deepopt launch train.py --workers 4 -- --lr 3e-4
    """
    from deepopt.job_file import load_job
    from deepopt.launch.preparation import import_from, prepare, with_absolute_paths
    from deepopt.launch.run_files import make_run_directory, new_run_path, refuse_used
    from deepopt_cli import launch_script as scripts

    warn_of_namesake()
    wanted = [*(overrides or ())]
    if job_file is not None and job_file.suffix == ".py":
        flags = {"--detach": detach, "--json": json, "--plan": plan is not None}
        scripts.refuse_flags(job_file, flags)
        for key, number in (("training.steps", steps), ("faults.spares", spares)):
            if number is not None:
                wanted.append(f"{key}={number}")
        raise typer.Exit(
            scripts.launch_script(
                job_file,
                arguments or (),
                workers=workers,
                hostfile=hostfile,
                address=address,
                run_dir=run_dir,
                overrides=wanted,
                dry_run=dry_run,
            )
        )
    scripts.refuse_arguments(job_file, arguments or ())
    for key, value in (
        ("worker.count", workers),
        ("training.steps", steps),
        ("cluster.hostfile", None if hostfile is None else str(hostfile)),
        ("cluster.address", address),
        ("faults.spares", spares),
    ):
        if value is not None:
            wanted.append(f"{key}={json_text.dumps(value)}")
    job = with_absolute_paths(load_job(job_file, wanted))
    shown_as = run_dir or new_run_path(job.name)
    refuse_used(shown_as)
    import_from([Path.cwd()], job=job)
    prepared = prepare(job, plan_id=1, plan_file=plan)
    if dry_run:
        _show_plan(prepared, shown_as=shown_as, json=json)
        return
    if not json:
        show_start(prepared, shown_as=shown_as)
    run = make_run_directory(shown_as, prepared, import_roots=[Path.cwd()])

    from deepopt_cli import attend

    if detach:
        code = attend.detach(run, shown_as=shown_as, json=json, fresh=True)
    else:
        code = attend.attend(run, job=prepared.job, shown_as=shown_as, json=json, fresh=True)
    raise typer.Exit(code)


def warn_of_namesake() -> None:
    """Say on stderr when another distribution's `deepopt` is installed."""
    from deepopt_cli.distributions import explain_namesake, namesake

    if other := namesake():
        tell(f"warning: {explain_namesake(other)}")


def show_start(prepared: Prepared, *, shown_as: Path) -> None:
    """Say what will be done.

    Args:
        prepared: the job.
        shown_as: the run directory as the user would type it.
    """
    from deepopt_cli.plan_words import plan_lines

    say(f"run         {shown_as}")
    say("\n".join(plan_lines(prepared)))
    say()


def _show_plan(prepared: Prepared, *, shown_as: Path, json: bool) -> None:
    if json:
        say_json(
            {
                "job": prepared.job.model_dump(mode="json", by_alias=True),
                "model": prepared.skeleton.to_json(),
                "plan": prepared.plan.to_json(),
                "predicted_bubble": prepared.timeline.bubble,
                "costs": prepared.planned.costs.source,
                "compared": _compared(prepared),
                "run_dir": str(shown_as.absolute()),
            }
        )
        return
    from deepopt.schedule.draw import draw_text
    from deepopt_cli.plan_words import comparison_table

    show_start(prepared, shown_as=shown_as)
    if compared := comparison_table(prepared):
        say(f"compared, by simulated step time ({prepared.planned.costs.source} costs):")
        say(compared)
        say()
    # Without times: estimated costs are no seconds.
    say(draw_text(prepared.timeline, axis=False))
    say()
    say("dry run: nothing was started")


def _compared(prepared: Prepared) -> list[dict[str, Any]]:
    comparison = prepared.planned.comparison
    if comparison is None:
        return []
    fitting: list[dict[str, Any]] = [
        {
            "placement": str(found.shape),
            "schedule": found.schedule.name,
            "step_s": found.step_s,
            "bubble": found.timeline.bubble,
            "gap": found.gap,
            "peak_activations": max(found.peak_activations),
            "weight_copies": found.weight_copies,
        }
        for _, found in comparison.found
    ]
    return fitting + [
        {"placement": str(c.shape), "left_out": reason} for c, reason in comparison.left_out
    ]
