"""One supervisor a run directory: a lock that the kernel drops when its holder dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from deepopt.errors import RunDirectoryError

LOCK_NAME = "lock"


def lock_run_directory(run_dir: Path) -> int:
    """Take the lock of a run directory.

    Args:
        run_dir: the run directory.

    Returns:
        A descriptor; whoever has it open, also a child that inherited it, holds the lock.

    Raises:
        RunDirectoryError: somebody else holds it, or the folder cannot be written.
    """
    path = run_dir / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write in run directory {run_dir}: {error.strerror}",
            remedy="check that it exists and may be written, or name another one",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunDirectoryError(
            f"run directory {run_dir} is in use by another launch or supervisor",
            remedy="see `deepopt status`; end that job by `deepopt stop`, then try again",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise RunDirectoryError(
            f"cannot lock {path}: {error.strerror}",
            remedy="put the run directory on a file system that has locks",
        ) from error
    return descriptor
