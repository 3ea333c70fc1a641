"""`deepopt stop`: end a job cleanly, from any terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.cmd_status import RunArgument
from deepopt_cli.output import reports_errors, say, tell


@reports_errors
def stop(
    run_dir: RunArgument,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Longest wait for the job to end.")
    ] = 300.0,
    kill: Annotated[
        bool, typer.Option("--kill", help="End it at once, without a checkpoint.")
    ] = False,
) -> None:
    """Stop a job cleanly, with a checkpoint.

    It ends after the step in work; the command waits for that.

    \b
    Examples:
      deepopt stop runs/NAME
      deepopt stop runs/NAME --timeout 60
      deepopt stop runs/NAME --kill
    """
    _stop(run_dir, timeout_s=timeout, kill=kill)


def _stop(run_dir: Path, *, timeout_s: float, kill: bool) -> None:
    import time

    from deepopt.clock import SystemClock
    from deepopt.errors import ClusterError
    from deepopt.launch.follow import POLL_S
    from deepopt.launch.run_view import ENDED, open_run, read_status, read_supervisor, request

    run = open_run(run_dir)
    supervisor = read_supervisor(run)
    if supervisor is None or supervisor.lives() is False:
        state = (read_status(run) or {}).get("state", "starting")
        if state in ENDED:
            say(f"nothing to stop: the job is {state}")
        else:
            tell(
                f"warning: the job is recorded as {state}, but its supervisor is gone; "
                f"go on with: deepopt resume {run_dir}"
            )
        return
    if kill:
        request(run, kind="kill")
    else:
        request(run, kind="stop", checkpoint=True)
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + timeout_s
    while supervisor.lives() is not False:
        status = read_status(run) or {}
        # From another host the supervisor cannot be seen: its last word must do.
        if supervisor.lives() is None and status.get("state") in ENDED:
            break
        if clock.monotonic_s() > deadline_s:
            raise ClusterError(
                f"the job is still {status.get('state', 'starting')} after {timeout_s:g} s "
                f"(supervisor pid {supervisor.pid} on {supervisor.host})",
                remedy=f"wait: deepopt status {run_dir}; or end it without a checkpoint: "
                f"deepopt stop {run_dir} --kill",
            )
        time.sleep(POLL_S)
    status = read_status(run) or {}
    state = status.get("state", "starting")
    if state == "failed":
        message = (status.get("error") or {}).get("message", "it failed")
        tell(f"warning: the job did not stop, it failed: {message}")
        raise typer.Exit(int(status.get("exit_code") or 1))
    say(f"{state} at step {status.get('step')}; go on with: deepopt resume {run_dir}")
