"""`deepopt init`: write a commented job file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.output import reports_errors, say


@reports_errors
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("job.yaml"),
) -> None:
    """Write a commented job file with every key and its default.

    \b
    Examples:
      deepopt init
      deepopt init experiments/large.yaml
    """
    from deepopt.errors import InputError
    from deepopt.job_file import init_template

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(init_template())
    except FileExistsError:
        if path.is_dir():
            raise InputError(
                f"{path} is a folder", remedy=f"deepopt init {path / 'job.yaml'}"
            ) from None
        raise InputError(
            f"{path} exists and is not overwritten",
            remedy=f"give another name, for example: deepopt init {path.with_stem(path.stem + '-2')}",
        ) from None
    except FileNotFoundError:
        raise InputError(
            f"folder {path.parent} does not exist", remedy=f"mkdir -p {path.parent}"
        ) from None
    say(f"wrote {path}; train with: deepopt launch {path}")
