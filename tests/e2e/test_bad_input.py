"""A user's mistake: one clear error, the right exit code, no traceback, nothing started.

`tests/unit/test_cli_launch.py` walks through more of them, without a process for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import launcher


@pytest.mark.parametrize(
    ("sections", "options", "words"),
    [
        pytest.param(
            {"model": {"factory": "no_such_package:build", "kwargs": {}}},
            [],
            ["model.factory", "no_such_package"],
            id="import-fails",
        ),
        pytest.param({}, ["--workers", 40], ["40", "layers"], id="more-stages-than-layers"),
    ],
)
def test_it_is_named_with_its_place_and_the_next_step(
    sections: dict[str, Any], options: list[object], words: list[str], tmp_path: Path
) -> None:
    job = launcher.write_job(tmp_path, **sections)
    run_dir = tmp_path / "run"
    result = launcher.run("launch", job, "--run-dir", run_dir, *options)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not run_dir.exists()


def test_a_run_directory_in_use_or_foreign_is_refused(tmp_path: Path) -> None:
    job = launcher.write_job(tmp_path)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    result = launcher.run("launch", job, "--run-dir", taken)
    assert result.returncode == 1
    assert "taken" in result.stderr
    assert (taken / "notes.txt").read_text() == "mine"
    result = launcher.run("resume", taken)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_usage_errors_exit_with_2() -> None:
    assert launcher.run("launch", "--no-such-option").returncode == 2
