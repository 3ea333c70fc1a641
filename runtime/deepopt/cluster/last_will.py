"""A small process that outlives its maker by a moment: it ends what a killed maker leaves behind.

The kernel ends Ray's daemons with their owner, but not their helpers, which may take a minute to
notice, and nobody removes their folder. The maker must lead a session; everything that it starts
stays in that session, and that is what is ended.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from deepopt.cluster.process_table import find_process, session_members
from deepopt.cluster.ray_node import remove_temp_dir

KILL_TIMEOUT_S = 15.0  # for killed processes to be gone
_POLL_S = 0.02


class LastWill:
    """Armed when it is made, until `revoke`.

    The process inherits what the maker has open, so a lock is held until all is clean.
    """

    def __init__(self) -> None:
        assert os.getsid(0) == os.getpid(), "only the leader of a session can leave a will"
        reader, self._writer = os.pipe()
        maker = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(self._writer)
            _execute(reader, session=maker)
        os.close(reader)
        self._process = find_process(pid)

    def add_folder(self, folder: Path) -> None:
        """Have Ray's folder removed as well."""
        os.write(self._writer, f"{folder}\n".encode())

    def revoke(self) -> None:
        """End the process: its maker has cleaned up by itself."""
        if self._process is not None and self._process.send(signal.SIGKILL):
            with suppress(ChildProcessError):
                os.waitpid(self._process.pid, 0)


def _execute(reader: int, *, session: int) -> None:
    """Wait for the maker's end, then clean up; does not return."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with os.fdopen(reader) as pipe:
            folders = [Path(line.strip()) for line in pipe]  # ends when the maker has ended
        until_s = time.monotonic() + KILL_TIMEOUT_S
        while (left := session_members(session)) and time.monotonic() < until_s:
            for process in left:
                process.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        for folder in folders:
            remove_temp_dir(folder)
    finally:
        with suppress(BaseException):
            os._exit(0)
