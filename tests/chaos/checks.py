"""Rows that a test of this project has already: it is run, and its outcome stands in the table."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from chaos.report import Result, progress

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A row that tests are for.

    Args:
        name: the fault.
        tests: files, relative to the repository.
        chosen: pytest's `-k`; empty: all in the files.
    """

    name: str
    tests: tuple[str, ...]
    chosen: str = ""


CHECKS = (
    Check(
        name="kill -9 at each write of a checkpoint",
        tests=("tests/process/test_checkpoint_kill.py",),
    ),
    Check(
        name="truncated, flipped, missing, mixed shard or manifest",
        tests=(
            "tests/unit/test_checkpoint_store.py",
            "tests/unit/test_checkpoint_shard_file.py",
        ),
    ),
    Check(
        name="kill -9 in a line, in V, with steps that overlap",
        tests=("tests/process/test_recovery_in_place.py",),
    ),
    Check(
        name="resume at other stages, uneven: moments equal",
        tests=("tests/process/test_resume_on_other_stages.py",),
    ),
    Check(
        name="journal cut off; two resumes at once", tests=("tests/unit/test_head_journal.py",)
    ),
    Check(name="numbers that are not finite", tests=("tests/unit/test_bad_numbers.py",)),
)


def run_check(check: Check) -> Result:
    """Run the tests of a row."""
    progress(f"== {check.name}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *check.tests]
    if check.chosen:
        command += ["-k", check.chosen]
    began_s = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return Result(
        act="tests",
        name=check.name,
        note=f"{', '.join(Path(t).name for t in check.tests)}: {last}",
        wrong="" if done.returncode == 0 else f"{last} ({time.monotonic() - began_s:.0f} s)",
    )
