"""`deepopt status`: what a job is doing, from its run directory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.output import reports_errors, say, say_json

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN_DIR", help="Run directory, as printed by launch.")
]


FAULTS_SHOWN = 3  # blocks; --json has more


@reports_errors
def status(
    run_dir: RunArgument,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a job is doing: state, step, speed, workers, heartbeats, faults.

    Needs only the run directory: works during the job, after it, and when it has died.

    \b
    Examples:
      deepopt status runs/deepopt-20260101-120000-1a2b
      deepopt status runs/NAME --json | jq .state
    """
    from deepopt.launch.run_view import (
        ENDED,
        open_run,
        read_status,
        read_supervisor,
        status_age_s,
    )
    from deepopt_cli.fault_words import fault_lines
    from deepopt_cli.words import failure_details, status_lines, worker_table

    run = open_run(run_dir)
    supervisor = read_supervisor(run)
    alive = False if supervisor is None else supervisor.lives()
    # The head has not written yet: a launch that has only begun, or died before it could.
    content = read_status(run) or {
        "state": "starting",
        "step": 0,
        "generation": 0,
        "workers": [],
    }
    if json:
        say_json({**content, "supervisor_alive": alive, "run_dir": str(run.root)})
        return
    age_s = status_age_s(content)
    say(f"run         {run_dir}")
    say("\n".join(status_lines(content, supervisor_alive=alive, age_s=age_s)))
    ended = content["state"] in ENDED
    if content["workers"] and not ended:
        say()
        say(worker_table(content, age_s=age_s or 0.0))
    if content.get("faults"):
        say()
        say("\n".join(fault_lines(content["faults"], most=FAULTS_SHOWN)))
    error = content.get("error")
    if error:
        say()
        say(f"error: {error.get('message')}")
        details = failure_details(error, logs=run.logs, exit_code=content.get("exit_code"))
        if details:
            say(f"\n{details}")
    if alive is False and (not ended or content["state"] != "finished"):
        say()
        say(f"hint: deepopt resume {run_dir}")
