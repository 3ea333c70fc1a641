"""Starts the supervisor of a run."""

from __future__ import annotations

import shutil
import socket

from deepopt.cluster.group import STAGE_WORKER
from deepopt.cluster.process_table import find_process
from deepopt.errors import RunDirectoryError
from deepopt.launch.run_view import Supervisor
from deepopt.run_directory import RunDirectory


def start(run: RunDirectory, *, fresh: bool, stage_worker: str = STAGE_WORKER) -> Supervisor:
    """Start the supervisor of a run.

    Args:
        run: the run directory, with job, model and plan in it.
        fresh: nothing else is in it: it goes again when no supervisor can be started.
        stage_worker: import path of the class that does the workers' work.

    Raises:
        DeepoptError: it cannot be started.
    """
    from deepopt.head.supervisor import spawn_supervisor

    # Requests to an earlier launch, which ended before it read them.
    for path in run.requests.glob("*.json"):
        path.unlink(missing_ok=True)
    try:
        pid = spawn_supervisor(run.root, stage_worker=stage_worker)
    except BaseException as error:
        # A run directory that cannot be written or is in use is another one's by now.
        if fresh and not isinstance(error, RunDirectoryError):
            shutil.rmtree(run.root, ignore_errors=True)
        raise
    return Supervisor(process=find_process(pid), pid=pid, host=socket.gethostname())
