"""`deepopt export`: the weights of a run for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.output import reports_errors, say, say_json


class Format(StrEnum):
    """What is written."""

    HF = "hf"
    WEIGHTS = "weights"


@reports_errors
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory of a job.")],
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder, or an earlier export to replace.")
    ],
    format: Annotated[
        Format,
        typer.Option(
            help="hf: config.json and safetensors that from_pretrained loads; weights: safetensors "
            "under the names of the model's state_dict."
        ),
    ] = Format.HF,
    step: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Checkpoint. [default: the newest]")
    ] = None,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, metavar="GB", help="Largest file, in 10^9 bytes.")
    ] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write the weights of a run as a folder that other programs load.

    Reads a verified checkpoint; the job may still run. Optimizer state is left out.

    \b
    Examples:
      deepopt export runs/first --to gpt2-tuned
      deepopt export runs/first --to step-400 --step 400 --format weights
    """
    from deepopt.launch.export_run import export_run
    from deepopt.launch.run_view import open_run
    from deepopt_cli.progress import ProgressBar

    with ProgressBar() as bar:
        files = export_run(
            open_run(run_dir),
            to,
            kind=format.value,
            step=step,
            max_shard_bytes=round(shard_gb * 1e9),
            tell=None if json else bar.tell,
        )
    if json:
        say_json({"folder": str(to.absolute()), "files": [path.name for path in files]})
        return
    size = sum(path.stat().st_size for path in files)
    say(f"{to}: {', '.join(path.name for path in files)} ({size / 1e6:,.1f} MB)")
    if format is Format.HF:
        say(f'load it with: AutoModelForCausalLM.from_pretrained("{to}"), or its own class')
