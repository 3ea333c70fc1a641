"""`deepopt moe`: how evenly a run's experts are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.output import reports_errors, say, say_json

_HELP = """How evenly a run's experts are loaded.

\b
Examples:
  deepopt moe report runs/first
"""
moe = typer.Typer(name="moe", help=_HELP, no_args_is_help=True, rich_markup_mode=None)


@moe.callback()
def _moe() -> None:
    """A group, although it has but one command."""


@moe.command()
@reports_errors
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Page to write. [default: RUN_DIR/moe.html]"
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="The figures instead of a page, as a JSON object.")
    ] = False,
) -> None:
    """Write a page with pictures of a run's expert loads; of a run that goes on, as they are now.

    One HTML file that needs nothing else: MaxVio and gate mass over steps, a heat map of each layer,
    the load forecast and its error.

    \b
    Examples:
      deepopt moe report runs/first
      deepopt moe report runs/first -o experts.html
      deepopt moe report runs/first --json
    """
    from deepopt.errors import InputError
    from deepopt.launch.expert_view import read_expert_report
    from deepopt.launch.run_view import open_run
    from deepopt.telemetry.files import read_json_lines, write_text_atomic
    from deepopt_cli.moe_page import make_page

    run = open_run(run_dir)
    found = read_expert_report(run)
    if found is None:
        raise InputError(
            f"{run_dir} has no expert loads in {run.metrics.name}",
            remedy="its model has no deepopt.moe.ElbRouter, or no step is done yet; for models of others set "
            "elb.replace_routers",
        )
    if json:
        say_json(found)
        return
    path = output or run.root / "moe.html"
    metrics, loads = read_json_lines(run.metrics), read_json_lines(run.expert_loads)
    write_text_atomic(path, make_page(found, metrics=metrics, loads=loads, title=str(run_dir)))
    say(f"wrote {path}")
