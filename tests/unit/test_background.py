"""What takes cores beside the training."""

import os
import subprocess
import sys
import threading
import time

import pytest

from deepopt.worker.background import BackgroundTrial, cpu_s, session_members

_SPIN = "import sys\nprint('ready', flush=True)\nwhile True: pass"


def test_cpu_time_of_a_process_is_what_it_counts_itself() -> None:
    before = time.process_time()
    seen = cpu_s(os.getpid())
    assert seen is not None
    assert before <= seen <= time.process_time()


def test_a_process_that_is_gone_has_no_cpu_time() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert cpu_s(child.pid) is None


@pytest.fixture
def spinning() -> "subprocess.Popen[str]":  # type: ignore[misc]
    child = subprocess.Popen([sys.executable, "-c", _SPIN], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_processes_of_the_session_count_unless_they_are_workers(
    spinning: "subprocess.Popen[str]",
) -> None:
    assert spinning.pid in session_members()
    others = set(session_members()) - {spinning.pid}
    with_it, without = BackgroundTrial(others), BackgroundTrial({*others, spinning.pid})
    used = cpu_s(spinning.pid) or 0.0
    began = time.perf_counter()
    with_it.begin()
    without.begin()
    _wait_for_cpu_s(spinning.pid, used + 0.05)
    assert with_it.end().processes > 0.04 / (time.perf_counter() - began)
    assert without.end().processes == 0.0


def test_threads_beside_the_one_that_trains_count_alone() -> None:
    trial = BackgroundTrial(session_members())
    over = threading.Event()
    used: list[float] = []

    def spin() -> None:
        while not over.is_set():
            used[:] = [time.thread_time()]

    other = threading.Thread(target=spin)
    began = time.perf_counter()
    trial.begin()
    until = time.thread_time() + 0.05
    other.start()
    while time.thread_time() < until or not used or used[0] < 0.02:
        pass  # this thread's work is no background
    over.set()
    other.join()
    seconds = time.perf_counter() - began
    found = trial.end().threads * seconds
    assert found == pytest.approx(used[0], rel=0.3)
    assert trial.left_s() > 0


def _wait_for_cpu_s(pid: int, until: float) -> None:
    while (cpu_s(pid) or until) < until:
        os.sched_yield()
