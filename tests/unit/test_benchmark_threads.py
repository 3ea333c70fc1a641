"""Where the CPU time of a training went, by process and thread."""

from __future__ import annotations

import importlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The part of the benchmarks that reads threads."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("_thread_use")


@pytest.mark.parametrize(
    ("command_line", "role"),
    [
        (b"ray::WorkerActor.work\0\0\0", "workers"),
        (b"python3.11\0/x/_peer_pipelining.py\0--job\0j\0", "workers"),
        (b"python3.11\0/bin/torchrun\0--standalone\0/x/_peer_pipelining.py\0", "torchrun"),
        (b"ray::HeadActor.run\0", "head"),
        (b"/site-packages/ray/core/src/ray/raylet/raylet\0--a=ray::IDLE\0", "raylet"),
        (b"/usr/bin/other\0-x\0", "other"),
    ],
)
def test_a_process_is_known_by_its_command_line(
    part: Any, command_line: bytes, role: str
) -> None:
    assert part.role_of(command_line) == role


def test_each_workers_busiest_thread_has_a_row_and_the_rest_add_up(part: Any) -> None:
    Thread, Use = part.Thread, part.Use
    trains, helps = Thread("workers", 1, 2, "a"), Thread("workers", 1, 1, "b")
    other_trains, other_helps = Thread("workers", 5, 5, "a"), Thread("workers", 5, 6, "b")
    before = {trains: Use(cpu_s=100.0, faults=7), helps: Use(cpu_s=3.0)}
    after = {
        trains: Use(cpu_s=101.0, faults=8),
        helps: Use(cpu_s=3.5),
        other_trains: Use(cpu_s=2.0, yields=4),
        other_helps: Use(cpu_s=0.25),
    }

    used = part.by_role(before, after)

    assert used == {
        ("workers", part.BUSIEST): Use(cpu_s=3.0, faults=1, yields=4),
        ("workers", "b"): Use(cpu_s=0.75),
    }
    assert list(used) == [("workers", part.BUSIEST), ("workers", "b")]


def test_a_look_tells_a_thread_that_computes_from_one_that_waits(part: Any) -> None:
    ended = threading.Event()
    waits = threading.Thread(target=ended.wait)
    waits.start()
    before = part.look([os.getpid()])
    until_s = time.thread_time() + 0.02
    while time.thread_time() < until_s:
        pass
    after = part.look([os.getpid(), 2**22 + 1])  # no process has such an id
    ended.set()
    waits.join()

    tids = {thread.tid: use.since(before[thread]) for thread, use in after.items()}
    assert tids[threading.get_native_id()].cpu_s > 0.01
    assert tids[waits.native_id or 0].cpu_s < 0.01
