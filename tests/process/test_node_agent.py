"""The agent of a host with real processes: exits at once, why one is silent, the kill, the lease."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepopt.cluster.node_agent import AgentWord, NodeAgent, ProcessEnded
from deepopt.cluster.process_look import (
    ProcessLook,
    exit_status,
    exit_words,
    memory_kills,
    parse_look,
)

TIMEOUT_S = 60.0
LEASE_S = 0.5
SLEEP = "import time; time.sleep(120)"
SPIN = "while True: pass"


class Listener:
    """Takes an agent's words."""

    def __init__(self) -> None:
        self.words: queue.SimpleQueue[AgentWord | ProcessEnded] = queue.SimpleQueue()
        self.listens = True
        self.heard_s = [0.0, 0.0]  # when it listened to the last two words

    def tell(self, word: AgentWord | ProcessEnded) -> bool:
        self.words.put(word)
        listens = self.listens
        if listens:
            self.heard_s = [self.heard_s[1], time.monotonic()]
        return listens

    def until(
        self, what: Callable[[AgentWord | ProcessEnded], bool]
    ) -> AgentWord | ProcessEnded:
        """Wait for a word."""
        began_s = time.monotonic()
        while not what(word := self.words.get(timeout=TIMEOUT_S)):
            assert time.monotonic() - began_s < TIMEOUT_S
        return word


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def agent(listener: Listener) -> Iterator[NodeAgent]:
    agent = NodeAgent(tell=listener.tell, lease_s=LEASE_S, look_s=0.05)
    yield agent
    agent.close()


@pytest.fixture
def start() -> Iterator[Callable[[str], int]]:
    """Starts programs whose parent is not this process's agent, and reaps them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(program: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-S", "-c", program]))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def seen(pid: int, what: Callable[[ProcessLook], bool]) -> Callable[[object], bool]:
    return lambda word: (
        isinstance(word, AgentWord) and pid in word.looks and what(word.looks[pid])
    )


def kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def test_an_exit_is_told_at_once_with_its_signal(
    listener: Listener, start: Callable[[str], int]
) -> None:
    agent = NodeAgent(tell=listener.tell, lease_s=9e9, look_s=10 * TIMEOUT_S)
    try:
        pid = start(SLEEP)
        assert agent.watch(pid)
        os.kill(pid, signal.SIGKILL)
        ended = ProcessEnded(host=socket.gethostname(), pid=pid, how="killed by SIGKILL")
        listener.until(lambda word: word == ended)  # long before the next look
        assert agent.living() == []
        assert not agent.watch(2**22 + 1)
    finally:
        agent.close()


def test_the_signal_is_known_though_the_parent_takes_the_exit_in_between(
    start: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = start(SLEEP)
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        status = exit_status(pid, pidfd=pidfd)
        assert status is not None
        assert os.WTERMSIG(status) == signal.SIGKILL

        def read_text(path: Path) -> str:
            os.waitpid(pid, 0)
            raise FileNotFoundError(path)

        monkeypatch.setattr(Path, "read_text", read_text)
        status = exit_status(pid, pidfd=pidfd)
        if status is None and kernel() < (6, 15):
            pytest.skip("this kernel forgets a process's exit once its parent has taken it")
        assert status is not None
        assert os.WTERMSIG(status) == signal.SIGKILL
    finally:
        os.close(pidfd)


def test_stopped_busy_and_idle_are_told_apart_and_kill_ends_them(
    agent: NodeAgent, listener: Listener, start: Callable[[str], int]
) -> None:
    stopped, busy = start(SLEEP), start(SPIN)
    agent.watch(stopped)
    agent.watch(busy)
    listener.until(seen(busy, lambda look: (look.cpu_share or 0.0) > 0.2))
    listener.until(seen(stopped, lambda look: look.state == "S" and look.cpu_share == 0.0))
    os.kill(stopped, signal.SIGSTOP)
    listener.until(seen(stopped, lambda look: look.is_stopped))
    agent.kill([stopped, busy, os.getpid()])  # the last one is none of its own
    left = {stopped, busy}
    while left:
        listener.until(lambda word: isinstance(word, ProcessEnded))
        left = set(agent.living())


def test_workers_are_killed_when_nobody_listens_for_the_lease(
    agent: NodeAgent, listener: Listener, start: Callable[[str], int]
) -> None:
    pid = start(SLEEP)
    agent.watch(pid)
    for _ in range(20):  # twice the lease
        listener.until(lambda word: isinstance(word, AgentWord))
    assert agent.living() == [pid]
    listener.listens = False
    ended = listener.until(lambda word: isinstance(word, ProcessEnded))
    assert isinstance(ended, ProcessEnded)
    assert ended.at_s is not None
    # An agent counts from before it spoke, so at the earliest from the word before the last.
    assert ended.at_s - listener.heard_s[0] >= LEASE_S


def test_a_look_reads_state_debugger_and_share_of_the_cpu() -> None:
    stat = "7 (a) b (c)) t 1 7 7 0 -1 0 0 0 0 0 300 100 0 0 20 0 1 0 55 0 0"
    ticks = os.sysconf("SC_CLK_TCK")
    before = ProcessLook(state="R", cpu_s=200 / ticks)
    look = parse_look(stat, status="Name:\tx\nTracerPid:\t42\n", before=before, elapsed_s=4.0)
    assert (look.state, look.tracer, look.cpu_share) == ("t", 42, 200 / ticks / 4.0)
    assert look.is_traced
    assert not look.is_stopped
    assert look.words() == "held by a debugger (pid 42)"


@pytest.mark.parametrize(
    ("status", "out_of_memory", "words"),
    [
        (9, False, "killed by SIGKILL"),
        (9, True, "killed by SIGKILL: the kernel's out-of-memory killer was at work"),
        (11, True, "killed by SIGSEGV"),
        (3 << 8, False, "exit code 3"),
        (None, True, "killed for want of memory"),
        (None, False, ""),
    ],
)
def test_an_end_in_words(status: int | None, out_of_memory: bool, words: str) -> None:
    assert exit_words(status, out_of_memory=out_of_memory) == words


def test_the_kernel_s_count_of_memory_kills_is_read(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 5\nother 2\n")
    assert memory_kills(tmp_path / "vmstat") == 5
    assert memory_kills(tmp_path / "none") == 0
