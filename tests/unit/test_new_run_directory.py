"""A new run directory appears whole or not at all, and belongs to one launch."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepopt.errors import RunDirectoryError
from deepopt.launch.run_files import new_run_directory


def test_of_two_launches_into_one_folder_one_gets_it_and_the_other_leaves_it_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run"
    with new_run_directory(path) as run:
        run.model.write_text("mine")
        with pytest.raises(RunDirectoryError, match="in use"), new_run_directory(path):
            pass
        run.job.write_text("mine")
    with pytest.raises(RunDirectoryError, match="holds a job"), new_run_directory(path):
        pass
    assert [file.read_text() for file in (run.model, run.job)] == ["mine", "mine"]


def test_what_could_not_be_filled_goes_again_and_can_be_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"

    def fail() -> None:
        with new_run_directory(path) as run:
            run.model.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not path.exists()
    with new_run_directory(path) as run:
        assert not run.model.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            RunDirectoryError, match=r"cannot write run directory .*: Not a directory"
        ),
        new_run_directory(tmp_path / "file" / "run"),
    ):
        pass
