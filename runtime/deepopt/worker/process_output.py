"""Sends everything that a process prints, its libraries and its crash included, to a log file."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def redirect_output(path: Path) -> None:
    """Let stdout, stderr, logging and the fatal-signal handler write to a file.

    Args:
        path: the file; appended to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # New objects: Ray may have put its own in place, which add prefixes or write elsewhere.
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    faulthandler.enable(file=sys.stderr)
    logging.basicConfig(level=logging.INFO, format=FORMAT, stream=sys.stderr, force=True)
