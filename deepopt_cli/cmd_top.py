"""`deepopt top`: look on a job while it runs, or at how it ended."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import reports_errors, say_json

if TYPE_CHECKING:
    from rich.console import Console

    from deepopt.launch.run_feed import RunFeed
    from deepopt.run_directory import RunDirectory
    from deepopt_cli.top_picture import TopPicture

POLL_S = 0.5
PLAIN_WIDTH = 120  # columns where there is no terminal to ask


@reports_errors
def top(
    run_dir: RunArgument,
    once: Annotated[
        bool, typer.Option("--once", help="Show the present state once, also on a terminal.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object, once.")] = False,
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Layer whose experts are mapped. [default: the first]"
        ),
    ] = None,
) -> None:
    """Look on a job: progress, stages, heartbeats, faults, and how evenly experts are loaded.

    On a terminal the picture is redrawn until the job has ended; Ctrl-C leaves it, and the job goes on.
    Needs only the run directory: for jobs that run detached, on another host, or have ended.

    \b
    Examples:
      deepopt top runs/NAME
      deepopt top runs/NAME --layer blocks.3
      deepopt top runs/NAME --once
      deepopt top runs/NAME --json | jq .experts.last.max_vio
    """
    from deepopt.launch.run_feed import RunFeed
    from deepopt.launch.run_view import ENDED, open_run

    run = open_run(run_dir)
    if json:
        say_json(_as_json(run))
        return
    from rich.console import Console

    from deepopt_cli.top_picture import TopPicture

    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else PLAIN_WIDTH)
    picture = TopPicture(title=str(run_dir), layer=layer, only_ascii=console.options.ascii_only)
    feed = RunFeed(run)
    goes_on = feed.look(picture)
    _refuse_unknown(layer, picture)
    if is_terminal and not once and goes_on and not console.is_dumb_terminal:
        goes_on = _stay(feed, picture, console)
    vanished = not goes_on and picture.state not in ENDED
    note = f"its supervisor is gone: deepopt resume {run_dir}" if vanished else ""
    console.print(picture.render(note=note))


def _stay(feed: RunFeed, picture: TopPicture, console: Console) -> bool:
    """Redraw until the job has ended or Ctrl-C; whether it goes on."""
    from rich.live import Live

    note = "Ctrl-C leaves; the job goes on"
    with Live(
        picture.render(note=note), console=console, screen=True, auto_refresh=False
    ) as live:
        try:
            while feed.look(picture):
                live.update(picture.render(note=note), refresh=True)
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            return True
    return False


def _refuse_unknown(layer: str | None, picture: TopPicture) -> None:
    from deepopt.errors import InputError

    layers = picture.experts.layers
    if layer is not None and layer not in layers:
        raise InputError(
            f"layer {layer!r} has no experts whose load is known",
            remedy=f"known: {', '.join(layers)}" if layers else "none is known yet",
        )


def _as_json(run: RunDirectory) -> dict[str, Any]:
    from deepopt.launch.expert_view import read_expert_report
    from deepopt.launch.run_view import read_status, read_supervisor
    from deepopt.telemetry.files import read_json_lines

    supervisor = read_supervisor(run)
    metrics = read_json_lines(run.metrics)
    return {
        "run_dir": str(run.root),
        "supervisor_alive": False if supervisor is None else supervisor.lives(),
        "status": read_status(run),
        "last_step": metrics[-1] if metrics else None,
        "experts": read_expert_report(run),
    }
