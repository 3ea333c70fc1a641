"""`deepopt profile`: measure the model on the machines, plan the stages, write the plan file."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepopt_cli.cluster_options import DEFAULT_EFFICIENCY
from deepopt_cli.output import EXIT_INTERRUPTED, reports_errors, say, say_json, tell

if TYPE_CHECKING:
    from deepopt.config import JobConfig
    from deepopt.launch.profiling import Profiled
    from deepopt.planner.plan_file import PlanFile
    from deepopt_cli.progress import ProgressBar

DEFAULT_OUTPUT = Path("plan.yaml")


@reports_errors
def profile(
    job_file: Annotated[
        Path | None, typer.Argument(metavar="JOB.yaml", help="Job file; none: all defaults.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of workers. [default: GPUs, or 4 without]"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan goes.")
    ] = DEFAULT_OUTPUT,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job; repeatable."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hosts to measure, lines of `host slots=N`."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Running Ray cluster to join.")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="NxKIND",
            help="Count instead of measuring, for GPUs that are not here: 128xA100, 8xH100, 64xH200.",
        ),
    ] = None,
    efficiency: Annotated[
        float,
        typer.Option(help="With --devices: the reached part of the vendor's rates, up to 1."),
    ] = DEFAULT_EFFICIENCY,
    json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
) -> None:
    """Measure each layer, device and link where the job would run, and plan its stages.

    Nothing is trained; repeated layers are measured once, and
    once more to check. With --devices nothing is started: operations and bytes are counted on the meta
    device and divided by the vendor's rates, and the plan file says so. The plan file is for reading and
    editing; `deepopt launch --plan` uses it.

    \b
    Examples:
      deepopt profile
      deepopt profile job.yaml --workers 4 -o plan.yaml
      deepopt profile job.yaml --hostfile hosts -o cluster.yaml
      deepopt profile job.yaml --devices 8xA100 -o a100.yaml
      deepopt launch job.yaml --plan plan.yaml
    """
    from deepopt.job_file import load_job
    from deepopt.launch.preparation import import_from, with_absolute_paths
    from deepopt.launch.profiling import ProfileInterrupted
    from deepopt.planner.plan_text import write_plan_file
    from deepopt.telemetry.files import write_text_atomic

    given = {"--workers": workers, "--hostfile": hostfile, "--address": address}
    _check_devices(devices, [name for name, value in given.items() if value is not None])
    wanted = [*(overrides or ())]
    for key, value in (
        ("worker.count", workers),
        ("cluster.hostfile", None if hostfile is None else str(hostfile)),
        ("cluster.address", address),
    ):
        if value is not None:
            wanted.append(f"{key}={json_text.dumps(value)}")
    job = with_absolute_paths(load_job(job_file, wanted))
    _check_output(output)
    import_from([Path.cwd()], job=job)
    try:
        plan_file = _measured(job, devices=devices, efficiency=efficiency)
    except ProfileInterrupted:
        tell(f"interrupted; {output} was not written")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    write_text_atomic(output, write_plan_file(plan_file))
    if json:
        say_json({"plan": plan_file.model_dump(mode="json"), "file": str(output.absolute())})
        return
    from deepopt_cli.plan_views import plan_file_lines

    say("\n".join(plan_file_lines(plan_file)))
    say()
    job_words = "" if job_file is None else f" {job_file}"
    say(f"wrote {output}")
    say(f"  deepopt plan show {output}")
    say(f"  deepopt launch{job_words} --plan {output}")


def _measured(job: JobConfig, *, devices: str | None, efficiency: float) -> PlanFile:
    from deepopt.planner.plan_make import make_plan_file
    from deepopt_cli.progress import ProgressBar

    with ProgressBar() as bar:
        found = _found(job, bar, devices=devices, efficiency=efficiency)
        bar.tell("planning", 1.0)
        plan_file = make_plan_file(found.measured, job=found.job, skeleton=found.skeleton)
    for warning in found.warnings:
        tell(f"warning: {warning}")
    return plan_file


def _found(
    job: JobConfig, bar: ProgressBar, *, devices: str | None, efficiency: float
) -> Profiled:
    if devices is None:
        from deepopt.launch.profiling import profile as measure

        return measure(job, import_roots=[Path.cwd()], tell=bar.tell)
    from deepopt.launch.analytic_profile import analytic_profile
    from deepopt.planner.hardware import parse_cluster

    bar.tell("counting", 0.0)
    return analytic_profile(job, cluster=parse_cluster(devices), efficiency=efficiency)


def _check_devices(devices: str | None, others: list[str]) -> None:
    """Devices that are not here have no hosts, and their number says the workers'."""
    from deepopt.errors import InputError

    if devices is not None and others:
        raise InputError(
            f"--devices {devices} and {' and '.join(others)} exclude each other",
            remedy="--devices counts for GPUs that are not here; leave one of them out",
        )


def _check_output(output: Path) -> None:
    """Find out before the measurement whether its result can be written."""
    from deepopt.errors import InputError

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(
            f"--output {output} is no file in a folder that exists",
            remedy="name a file, for example -o plan.yaml",
        )
