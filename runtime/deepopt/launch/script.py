"""Script mode: `deepopt launch train.py -- ...` runs a user's script; its `DeepTrainer`s go where the
launch says.

The command line starts `python -m deepopt.launch.script` with the launch's options in an environment
variable; it runs the script as `python train.py` would, and turns what it raises into an exit code. A
`DeepTrainer` asks `launched()`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepopt.errors import DeepoptError

VARIABLE = "DEEPOPT_SCRIPT_LAUNCH"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_runs: list[Path] = []  # run directories that this script has made


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptLaunch:
    """What `deepopt launch` was told for the trainers of a script.

    Args:
        workers: how many; None: as the trainer says.
        hostfile: hosts; None: as the trainer says.
        address: of a Ray cluster; None: as the trainer says.
        run_dir: of the first fit; of the second `RUN_DIR-2`, and so on.
        settings: keys of the job, nested.
    """

    workers: int | None = None
    hostfile: str | None = None
    address: str | None = None
    run_dir: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_env(self) -> str:
        """For the environment variable."""
        return json.dumps(asdict(self))


def launched() -> ScriptLaunch | None:
    """What this script was launched with; None outside `deepopt launch`."""
    text = os.environ.get(VARIABLE)
    return None if text is None else ScriptLaunch(**json.loads(text))


def merged(
    settings: Mapping[str, Mapping[str, Any]], more: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Nested keys; those of `more` win."""
    sections = dict.fromkeys((*settings, *more))
    return {name: {**settings.get(name, {}), **more.get(name, {})} for name in sections}


def next_run_dir(launch: ScriptLaunch) -> Path | None:
    """Where the next fit of this script goes; None: to a new name.

    Args:
        launch: of the script.
    """
    if launch.run_dir is None:
        return None
    number = len(_runs) + 1
    return Path(launch.run_dir if number == 1 else f"{launch.run_dir}-{number}")


def note_run(path: Path) -> None:
    """A trainer of this script has made a run directory."""
    _runs.append(path)


def run_script(path: Path, arguments: list[str]) -> int:
    """Run a script as `python path arguments` would.

    Args:
        path: of the script.
        arguments: for it.

    Returns:
        The exit code: the script's own; that of a `DeepoptError` it did not catch; 1 for any other
        exception; 130 when it was interrupted.
    """
    sys.argv = [str(path), *arguments]
    sys.path[0] = str(path.parent.absolute())
    code = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        code = _exit_code(end)
    except KeyboardInterrupt:
        _tell("interrupted")
        code = EXIT_INTERRUPTED
    except DeepoptError as error:
        _tell(f"error: {error.message}{_place(error, path)}")
        if error.remedy:
            _tell(f"\nhint: {error.remedy}")
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001 - the process's edge
        own = error.__traceback__
        while own is not None and own.tb_frame.f_code.co_filename != str(path):
            own = own.tb_next  # what runs the script is nothing to its author
        traceback.print_exception(type(error), error, own or error.__traceback__)
        code = 1
    if code == 0 and not _runs:
        _tell(
            f"note: {path} ended without a DeepTrainer that trained: nothing ran on the cluster, and "
            "the options of deepopt launch had no effect (docs/models.md, scripts)"
        )
    return code


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    _tell(str(end.code))
    return 1


def _place(error: BaseException, path: Path) -> str:
    lines = [
        summary.lineno
        for summary in traceback.extract_tb(error.__traceback__)
        if summary.filename == str(path)
    ]
    return f" ({path}:{lines[-1]})" if lines else ""


def _tell(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> None:
    """The process's entry: a script and its arguments."""
    from deepopt.launch import script as module  # this file again, under its importable name

    code = module.run_script(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
