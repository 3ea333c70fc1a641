"""The command answers at once, because it loads nothing heavy before a command needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from deepopt_cli.app import app

HEAVY = ("ray", "torch", "pydantic", "rich", "numpy", "yaml", "tensorboard")
DEEPOPT = Path(sys.executable).with_name("deepopt")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEEPOPT), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_nothing_heavy_is_loaded_with_the_app() -> None:
    script = f"import sys, deepopt_cli.app; print([m for m in {HEAVY!r} if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_a_worker_loads_neither_triton_nor_a_compiler_before_it_needs_them() -> None:
    unused = ("triton", "torch._dynamo", "torch._inductor", "tensorboard", "transformers")
    unused += ("sympy",)
    script = (
        "import sys, torch, deepopt.worker.stage_worker\n"
        "from deepopt.config import JobConfig\n"
        "from deepopt.convert import build_layers\n"
        "build_layers(JobConfig(), [0, 1], device=torch.device('cpu'))\n"
        f"print([m for m in {unused!r} if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_help_answers_in_under_four_tenths_of_a_second() -> None:
    times_s = []
    for _ in range(5):
        began_s = (
            cpu_time_of_children_s()
        )  # it waits for nothing; other tests load this machine
        assert run("--help").returncode == 0
        times_s.append(cpu_time_of_children_s() - began_s)
    assert min(times_s) < 0.4, times_s


def cpu_time_of_children_s() -> float:
    """Of all that have ended and were waited for."""
    used = os.times()
    return used.children_user + used.children_system


def test_schedules_are_searched_and_drawn_without_anything_heavy() -> None:
    script = (
        "import sys, deepopt_cli.app\n"
        "deepopt_cli.app.app(sys.argv[1:], standalone_mode=False)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules and m != 'pydantic'])"  # typer's own
    )
    for arguments in (
        ("show", "--placement", "v", "--effort", "1000", "--svg", os.devnull),
        ("compare", "--effort", "100", "--ranks", "2"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, "schedule", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"


def every_command(group: Any = None, name: str = "") -> Iterator[str]:
    """The words of each command and group of commands."""
    group = group or typer.main.get_command(app)
    for word, command in group.commands.items():
        yield f"{name}{word}"
        if hasattr(command, "commands"):
            yield from every_command(command, f"{name}{word} ")


@pytest.mark.parametrize("command", [*every_command()])
def test_each_command_has_help_with_examples(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert f"  deepopt {command} " in shown.stdout.partition("Examples:")[2].replace(
        "\n", " \n"
    )


def test_wrong_usage_is_exit_code_2() -> None:
    refused = run("launch", "--no-such-option")
    assert refused.returncode == 2
    assert "No such option: --no-such-option" in refused.stderr
    assert refused.stdout == ""


def test_the_version_names_the_distribution() -> None:
    shown = run("--version")
    assert shown.returncode == 0
    assert shown.stdout.startswith("deepopt ")
    assert "(distribution deepopt-cuda)" in shown.stdout
