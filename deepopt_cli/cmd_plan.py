"""`deepopt plan`: show a plan file, and compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepopt_cli.output import reports_errors, say, say_json, tell

if TYPE_CHECKING:
    from deepopt.planner.plan_file import PlanFile

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="A plan file.")]

_HELP = """Show and compare plan files.

\b
Examples:
  deepopt plan show plan.yaml
  deepopt plan diff before.yaml after.yaml
"""
plan = typer.Typer(
    name="plan",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@reports_errors
def show(
    plan_file: PlanArgument,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a drawing.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
) -> None:
    """Show layers, stages, links and what a step will take; the prediction is computed anew.

    \b
    Examples:
      deepopt plan show plan.yaml
      deepopt plan show plan.yaml --svg plan.svg --html plan.html
      deepopt plan show plan.yaml --json | jq .predicted
    """
    from deepopt.planner.plan_make import timeline_of
    from deepopt.schedule.draw_files import draw_svg
    from deepopt_cli.plan_views import plan_file_lines, plan_page

    found = _read(plan_file)
    if json:
        say_json(found.model_dump(mode="json"))
    else:
        say("\n".join(plan_file_lines(found)))
    if svg is not None:
        _write(svg, draw_svg(timeline_of(found)))
    if html is not None:
        _write(html, plan_page(found, timeline_of(found)))


@reports_errors
def diff(
    first: PlanArgument,
    second: PlanArgument,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say in what two plans differ. Exit code 0 if in nothing, 1 otherwise, as `diff` has it.

    \b
    Examples:
      deepopt plan diff equal.yaml uneven.yaml
      deepopt plan diff before.yaml after.yaml --json
    """
    from deepopt.planner.plan_check import plan_differences
    from deepopt_cli.output import table

    rows = list(plan_differences(_read(first), _read(second)))
    if json:
        say_json(
            {
                "differences": [
                    {"what": what, "first": old, "second": new} for what, old, new in rows
                ]
            }
        )
    elif rows:
        say(table(("what", str(first), str(second)), rows))
    else:
        say("no difference")
    raise typer.Exit(1 if rows else 0)


def _read(path: Path) -> PlanFile:
    """A plan file with what it predicts as it stands, whatever its `predicted` says."""
    from deepopt.launch.plan_use import load_plan_file
    from deepopt.planner.plan_make import predicted

    return predicted(load_plan_file(path))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    tell(f"wrote {path}")


for command in (show, diff):
    plan.command()(command)
