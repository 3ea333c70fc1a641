"""kill -9 at every call that changes the disk: there is always a checkpoint to load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_kill_at_any_disk_call_leaves_the_newest_committed_checkpoint(tmp_path: Path):
    run = subprocess.run(
        [sys.executable, "-m", "support.killed_checkpoints", tmp_path],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *killed, last = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(one["killed"] for one in killed)
    assert last["status"] == 0
    assert last["told"] == ["30", "40", "40", "done"]
    # 3 checkpoints of 2 shards and a manifest: at least open, write and fsync of each.
    assert len(killed) > 3 * 3 * 3
    for one in killed:
        committed = [20, *(int(step) for step in one["told"])][-1]
        assert one["before"] >= committed, one
        assert one["after"] == one["before"], one
        assert not [name for name in one["names"] if "." in name], one
        assert len(one["names"]) >= 2, one
    assert {one["before"] for one in killed} == {20, 30, 40}
