"""SIGTERM is a notice that a busy process takes at once."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import sys, threading, time
from deepopt.worker.preemption import on_sigterm
in_thread = []
thread = threading.Thread(target=lambda: in_thread.append(on_sigterm(lambda: None)))
thread.start(); thread.join()
assert in_thread == [False]
noticed = threading.Event()
assert on_sigterm(noticed.set)
print("ready", flush=True)
threading.Lock().acquire()
lock = threading.Lock(); lock.acquire()
threading.Thread(target=lambda: (noticed.wait(), print("noticed", flush=True), lock.release())).start()
lock.acquire()  # the main thread runs no Python until then
"""


def test_sigterm_is_told_while_the_main_thread_waits_and_does_not_end_the_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noticed\n"
        assert process.wait(timeout=60) == 0
