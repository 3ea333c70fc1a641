"""`deepopt logs`: the logs of a job's processes, also while they grow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import ranges, reports_errors, say, tell

if TYPE_CHECKING:
    from deepopt.run_directory import RunDirectory

POLL_S = 0.2


@reports_errors
def logs(
    run_dir: RunArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Only the worker of this rank.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Only workers that hold this stage.")
    ] = None,
) -> None:
    """Show the logs of the supervisor, the head and the workers.

    \b
    Examples:
      deepopt logs runs/NAME
      deepopt logs runs/NAME -f --rank 2
      deepopt logs runs/NAME --stage 0
    """
    from deepopt.launch.run_view import open_run

    run = open_run(run_dir)
    wanted = _wanted_ranks(run, rank=rank, stage=stage)
    if follow:
        _follow(run, wanted)
        return
    sources = list(_find(run, wanted))
    if not sources:
        _refuse_missing(run, wanted)
    for source in sources:
        for line in source.read_new():
            say(line if len(sources) == 1 else f"{source.name} | {line}")


class _Source:
    """One growing log file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        self._offset = 0

    def read_new(self, *, last: bool = True) -> Iterator[str]:
        """Lines since the last call; a line without its end only when it is the last look."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        if not last:
            content = content[: content.rfind(b"\n") + 1]
        self._offset += len(content)
        yield from content.decode(errors="replace").splitlines()


def _wanted_ranks(run: RunDirectory, *, rank: int | None, stage: int | None) -> set[int] | None:
    """The ranks to show; None for everything."""
    from deepopt.errors import InputError
    from deepopt.planner.plan import Plan
    from deepopt.telemetry.files import read_json

    wanted = None if rank is None else {rank}
    if stage is None:
        return wanted
    plan = Plan.from_json(read_json(run.plan))
    num_stages = len(plan.boundaries)
    if stage >= num_stages:
        raise InputError(
            f"there is no stage {stage}: the plan has stages 0 to {num_stages - 1}",
            remedy=f"--rank names a worker; deepopt status {run.root} shows who holds what",
        )
    holders = set(plan.holders(stage))
    if wanted is None:
        return holders
    if not wanted & holders:
        raise InputError(f"rank {rank} does not hold stage {stage}; ranks {ranges(holders)} do")
    return wanted


def _find(run: RunDirectory, wanted: set[int] | None) -> Iterator[_Source]:
    if wanted is not None:
        paths = [run.rank_log(rank) for rank in sorted(wanted)]
    else:
        paths = sorted(
            run.logs.glob("*.log"),
            key=lambda path: (path.stem.startswith("rank-"), len(path.stem), path.stem),
        )
    yield from (_Source(path) for path in paths if path.is_file())


def _refuse_missing(run: RunDirectory, wanted: set[int] | None) -> None:
    from deepopt.errors import RunDirectoryError

    there = ", ".join(source.name for source in _find(run, None))
    what = "log" if wanted is None else f"log of rank {ranges(wanted)}"
    raise RunDirectoryError(
        f"there is no {what} in {run.logs}",
        remedy=f"there are: {there}" if there else "the job has not started its processes yet",
    )


def _follow(run: RunDirectory, wanted: set[int] | None) -> None:
    from deepopt.launch.run_view import ENDED, read_status, read_supervisor

    sources: dict[Path, _Source] = {}
    while True:
        supervisor = read_supervisor(run)
        alive = supervisor is not None and supervisor.lives()
        state = (read_status(run) or {}).get("state", "starting")
        ended = alive is False or (alive is None and state in ENDED)
        for source in _find(run, wanted):
            sources.setdefault(source.path, source)
        for source in sources.values():
            for line in source.read_new(last=ended):
                say(
                    line
                    if wanted is not None and len(wanted) == 1
                    else f"{source.name} | {line}"
                )
        if ended:
            break
        time.sleep(POLL_S)
    if state in ENDED:
        tell(f"the job is {state}")
    else:
        tell(f"the job is recorded as {state}, but its supervisor is gone")
