"""Another distribution's package `deepopt` is found and said."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepopt_cli import distributions
from deepopt_cli.app import app


@pytest.fixture
def optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Bayesian optimiser that is distributed as `deepopt`."""
    record = tmp_path / "deepopt-1.2.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: deepopt\nVersion: 1.2.0\n")
    (record / "top_level.txt").write_text("deepopt\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_alone_there_is_nothing_to_say() -> None:
    assert distributions.namesake() is None
    assert distributions.other_providers() == []


@pytest.mark.usefixtures("optimiser")
def test_a_namesake_is_found() -> None:
    assert distributions.namesake() == "deepopt 1.2.0"
    assert distributions.other_providers() == ["deepopt 1.2.0"]


@pytest.mark.usefixtures("optimiser")
def test_the_version_says_so_on_stderr() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0
    assert shown.stdout.startswith("deepopt ")
    assert "warning: the distribution 'deepopt 1.2.0' also provides" in shown.stderr


@pytest.mark.usefixtures("optimiser")
def test_a_launch_warns_before_it_does_anything() -> None:
    shown = CliRunner().invoke(app, ["launch", "no-such-file.yaml"])
    assert shown.exit_code == 1
    assert shown.stderr.startswith("warning: the distribution 'deepopt 1.2.0' also provides")


@pytest.mark.usefixtures("optimiser")
def test_a_shadowed_package_has_a_way_out() -> None:
    words = distributions.explain_shadow()
    assert (
        "pip uninstall deepopt && pip install --force-reinstall --no-deps deepopt-cuda" in words
    )
