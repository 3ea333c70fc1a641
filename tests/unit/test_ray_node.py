"""The folder of a private Ray, made and removed, and its raylet's command; no Ray is started."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from deepopt.cluster.ray_node import IDLE_AGENT, remove_temp_dir, without_agents

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


def test_a_raylet_starts_nothing_in_place_of_the_agents_that_nobody_asks() -> None:
    agents = [
        "--dashboard_agent_command=python agent.py --port=1",
        "--runtime_env_agent_command=python main.py --port=2",
    ]
    command = ["raylet", "--temp_dir=/tmp/x", *agents]
    assert without_agents(command, names=["dashboard_agent", "runtime_env_agent"]) == [
        *command[:2],
        f"--dashboard_agent_command={IDLE_AGENT}",
        f"--runtime_env_agent_command={IDLE_AGENT}",
    ]
    assert without_agents(command, names=["dashboard_agent"])[3] == agents[1]


def test_what_stands_for_an_agent_lives_with_options_that_a_raylet_adds() -> None:
    with subprocess.Popen([*shlex.split(IDLE_AGENT), "--disable-metrics-collection"]) as idle:
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                idle.wait(timeout=0.5)
        finally:
            idle.kill()
