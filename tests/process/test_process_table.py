"""Processes by pid and start time, with real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deepopt.cluster.process_table import (
    Process,
    descendants,
    find_process,
    session_members,
    this_process,
    wait_until_gone,
)

TIMEOUT_S = 60.0

# A child that starts a grandchild, says its pid, and leaves it an orphan.
ORPHAN = """
from subprocess import DEVNULL, Popen
print(Popen(["sleep", "100"], stdout=DEVNULL, stderr=DEVNULL).pid, flush=True)
"""

OWNER = f"""
import subprocess, sys, time
from deepopt.cluster.process_table import become_subreaper, kill_descendants
become_subreaper()
orphan = subprocess.run([sys.executable, "-c", {ORPHAN!r}], capture_output=True, text=True).stdout
print(orphan.strip(), flush=True)
sys.stdin.readline()
print(kill_descendants(timeout_s={TIMEOUT_S}), flush=True)
"""

# As a killed process of Ray for a moment: its first thread has ended, another one still forks and writes.
LATE_WRITER = """
import ctypes, os, platform, signal, subprocess, sys, threading
from pathlib import Path

def write():
    print(subprocess.Popen(["sleep", "100"], stdout=subprocess.DEVNULL).pid, os.getpid(), flush=True)
    while True:
        Path(sys.argv[1]).mkdir(exist_ok=True)

signal.alarm(60)  # if nobody kills it
threading.Thread(target=write).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # SYS_exit: this thread
"""

CLOSER = f"""
import subprocess, sys
from pathlib import Path
from deepopt.cluster.local import close_own_ray
from deepopt.cluster.process_table import become_subreaper, find_process
become_subreaper()
writer = subprocess.Popen([sys.executable, "-c", {LATE_WRITER!r}, sys.argv[1]], stdout=subprocess.PIPE)
pids = [int(word) for word in writer.stdout.readline().split()]
while Path(f"/proc/{{pids[1]}}/stat").read_text().split(") ")[1][0] != "Z":
    pass
print(close_own_ray(Path(sys.argv[1])), [find_process(pid) for pid in pids], flush=True)
"""

WILLED = """
import subprocess, sys, time
from pathlib import Path
from deepopt.cluster.last_will import LastWill
LastWill().add_folder(Path(sys.argv[1]))
print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
time.sleep(100)
"""


def test_a_process_lives_until_it_is_a_zombie() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        process = find_process(child.pid)
        assert process is not None
        assert process.is_alive()
        assert process in descendants(os.getpid())
        assert process.send(signal.SIGKILL)
        assert wait_until_gone([process], timeout_s=TIMEOUT_S) == []
        assert Path(f"/proc/{child.pid}").exists()  # not waited for yet
        assert not process.send(signal.SIGKILL)


def test_a_reused_pid_is_another_process() -> None:
    own = this_process()
    assert own.is_alive()
    predecessor = Process(own.pid, own.start_time - 1)
    assert not predecessor.is_alive()
    assert not predecessor.send(signal.SIGKILL)


def test_no_process_has_no_entry() -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert find_process(child.pid) is None


def test_an_owner_ends_its_orphans() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        orphan = find_process(int(owner.stdout.readline()))
        assert orphan is not None
        assert orphan in descendants(owner.pid)
        owner.stdin.write("\n")
        owner.stdin.flush()
        assert owner.stdout.readline().strip() == "[]"
        assert not orphan.is_alive()


def test_a_folder_stays_away_although_a_dying_process_still_wrote_into_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "deepopt-x"
    ended = subprocess.run(
        [sys.executable, "-c", CLOSER, str(folder)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (ended.stdout.strip(), ended.stderr) == ("[] [None, None]", "")
    assert not folder.exists()


def test_what_a_killed_owner_leaves_is_ended_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "deepopt-x"
    kept = tmp_path / "mine"
    for path in (folder, kept):
        path.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", WILLED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as owner:
        assert owner.stdout is not None
        child = find_process(int(owner.stdout.readline()))
        assert child is not None
        assert child in session_members(owner.pid)
        owner.kill()
        owner.wait()
        assert wait_until_gone([child], timeout_s=TIMEOUT_S) == []
        until_s = time.monotonic() + TIMEOUT_S
        while folder.exists() and time.monotonic() < until_s:
            time.sleep(0.02)
    assert not folder.exists()
    assert kept.exists()
