"""`deepopt evaluate`: the loss of a run's checkpoint on its evaluation data or on other text."""

from __future__ import annotations

from typing import Annotated

import typer

from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import EXIT_INTERRUPTED, reports_errors, say, say_json


@reports_errors
def evaluate(
    run_dir: RunArgument,
    step: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Checkpoint. [default: the newest]")
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Text file or glob instead of the run's own evaluation data; repeatable.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Number of workers. [default: as the run]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure the loss of a run's checkpoint: forwards alone, no step is trained.

    The mean over all samples, in eval mode, the last incomplete batch included; a run's own
    val_loss leaves that out. A job of its own, with a run directory under runs/; the run is not
    touched, and may go on.

    \b
    Examples:
      deepopt evaluate runs/first
      deepopt evaluate runs/first --step 400 --files 'heldout/*.txt' --json
      deepopt evaluate runs/first --workers 1

    Exit codes: as those of deepopt launch; see deepopt --help.
    """
    from deepopt.launch.resume_checks import refuse_incomplete
    from deepopt.launch.run_view import open_run
    from deepopt.trainer.evaluate_run import evaluate_run
    from deepopt.trainer.progress import NoView, make_forward_view

    run = open_run(run_dir)
    refuse_incomplete(run, run_dir)
    view = NoView() if json else make_forward_view()
    try:
        found = evaluate_run(
            run, view=view, step=step, files=tuple(files or ()), workers=workers
        )
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        view.close()
    if json:
        say_json(
            {
                "loss": found.loss,
                "step": found.step,
                "data": found.data,
                "time_s": found.time_s,
                "run_dir": str(found.run_dir),
            }
        )
        return
    say(f"step {found.step}: loss {found.loss:.6f} on {found.data} ({found.time_s:.1f} s)")
    say(f"run directory of the evaluation: {found.run_dir}")
