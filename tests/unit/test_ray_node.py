"""The folder of a private Ray: made, removed; no Ray is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepopt.cluster.ray_node import remove_temp_dir

remove_tree = shutil.rmtree


def test_a_file_that_came_while_the_folder_was_removed_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deepopt-x"
    folder.mkdir()
    late = iter((True, True, False))

    def remove(path: Path, *, ignore_errors: bool) -> None:
        remove_tree(path, ignore_errors=ignore_errors)
        if next(late):
            (path / "session" / "logs").mkdir(parents=True)

    monkeypatch.setattr(shutil, "rmtree", remove)
    assert remove_temp_dir(folder)
    assert not folder.exists()


def test_a_folder_that_comes_back_for_ever_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deepopt-x"
    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, *, ignore_errors: None)
    assert not remove_temp_dir(folder, timeout_s=0.0)


def test_a_folder_of_another_name_is_left_alone(tmp_path: Path) -> None:
    assert remove_temp_dir(tmp_path)
    assert tmp_path.exists()
