"""SIGTERM as a notice: whoever gets it has a short time left, and says so instead of dying at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def on_sigterm(call: Callable[[], None]) -> bool:
    """Have a function called, from a thread of its own, whenever this process gets SIGTERM.

    The main thread of a Ray process is in C++ and runs no Python handler; the byte that the signal writes
    into a pipe is seen at once.

    Args:
        call: takes nothing; must not raise.

    Returns:
        False when this is not the main thread: only that one may ask for signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while True:
            if signal.SIGTERM in os.read(reader, 16):
                call()

    threading.Thread(target=wait, name="sigterm", daemon=True).start()
    return True
