"""The command `deepopt`: the list of its commands, each in a module of its own.

Nothing heavy is imported here or at the top of a command's module, so that `--help` answers at
once; torch, ray, pydantic and rich come with the command that needs them.
"""

from __future__ import annotations

from typing import Annotated

import typer

from deepopt_cli.cmd_evaluate import evaluate
from deepopt_cli.cmd_export import export
from deepopt_cli.cmd_init import init
from deepopt_cli.cmd_launch import launch
from deepopt_cli.cmd_logs import logs
from deepopt_cli.cmd_moe import moe
from deepopt_cli.cmd_plan import plan
from deepopt_cli.cmd_profile import profile
from deepopt_cli.cmd_resume import resume
from deepopt_cli.cmd_schedule import schedule
from deepopt_cli.cmd_schema import schema
from deepopt_cli.cmd_status import status
from deepopt_cli.cmd_stop import stop
from deepopt_cli.cmd_top import top
from deepopt_cli.output import say, tell

app = typer.Typer(
    name="deepopt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    launch,
    profile,
    resume,
    status,
    top,
    logs,
    stop,
    evaluate,
    export,
    init,
    schema,
):
    app.command()(command)
app.add_typer(moe)
app.add_typer(plan)
app.add_typer(schedule)


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from deepopt_cli.distributions import OWN, explain_namesake, other_providers, own_version

    say(f"deepopt {own_version()} (distribution {OWN})")
    for other in other_providers():
        tell(f"warning: {explain_namesake(other)}")
    raise typer.Exit


@app.callback()
def deepopt(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Train PyTorch models as a pipeline over many devices.

    \b
    deepopt launch                      train the built-in model, 4 workers on this machine
    deepopt init && deepopt launch job.yaml
    deepopt resume runs/NAME            go on from the newest checkpoint

    Exit codes: 0 ok, 1 bad input, 2 usage, 3 cluster, 4 lost workers beyond the budget, 5 training
    failed, 130 interrupted.
    """


def main() -> None:
    """Run the command line."""
    app()
