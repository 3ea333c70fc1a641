"""Processes that stand in for the other workers of a host while a launch measures layers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepopt.worker.company import company, num_companions


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_companions_compute_until_the_end_of_the_block() -> None:
    with company(2) as processes:
        assert len(processes) == 2
        before = [cpu_s(process.pid) for process in processes]
        ends_s = time.monotonic() + 20.0
        while any(cpu_s(p.pid) <= b for p, b in zip(processes, before, strict=True)):
            assert time.monotonic() < ends_s, "a companion does nothing"
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


def test_companions_end_when_the_block_fails() -> None:
    with pytest.raises(KeyError), company(1) as processes:
        raise KeyError
    assert processes[0].returncode == -signal.SIGKILL


def test_companions_end_with_a_process_that_is_killed() -> None:
    script = (
        "import os, signal\n"
        "from deepopt.worker.company import company\n"
        "with company(1) as processes:\n"
        "    print(processes[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL
    try:
        companion = os.pidfd_open(int(killed.stdout))
    except ProcessLookupError:
        return  # it was faster
    try:
        assert select.select([companion], [], [], 20.0)[0], "it outlived who started it"
    finally:
        os.close(companion)


def test_as_many_stand_in_as_would_train_here_and_at_most_one_for_each_core() -> None:
    assert num_companions(1, threads=1, cores=2) == 0
    assert num_companions(2, threads=1, cores=8) == 1
    assert num_companions(4, threads=1, cores=2) == 2
    assert num_companions(64, threads=1, cores=2) == 2
    # Wall time counts with more threads: nobody may take this worker's cores.
    assert num_companions(4, threads=2, cores=2) == 0
    assert num_companions(4, threads=2, cores=8) == 3
