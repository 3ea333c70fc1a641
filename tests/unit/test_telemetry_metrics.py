"""Figures reach every sink that works; a broken sink is switched off and training goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from deepopt.run_directory import RunDirectory
from deepopt.telemetry import metrics
from deepopt.telemetry.events import Warned
from deepopt.telemetry.files import read_json_lines


class Recorder:
    """A sink that remembers, and fails when told to."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.closed = 0
        self._fails_at = fails_at

    def write(self, step: int, scalars: Mapping[str, object]) -> None:
        if step == self._fails_at:
            raise RuntimeError("the server hung up")
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


def scalars_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_a_step_reaches_json_lines_and_tensorboard_at_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    sinks = metrics.open_metrics_sinks(run, tensorboard=True)
    assert sinks.names == ("jsonl", "tensorboard")
    sinks.write(1, {"loss": 5.5, "compute_s": [0.25, 0.5], "note": "text", "bad": float("nan")})
    assert read_json_lines(run.metrics) == [
        {"step": 1, "loss": 5.5, "compute_s": [0.25, 0.5], "note": "text", "bad": None}
    ]
    assert scalars_of(run.tensorboard) == {
        "loss": [(1, 5.5)],
        "compute_s/rank_0": [(1, 0.25)],
        "compute_s/rank_1": [(1, 0.5)],
    }
    sinks.close()
    sinks.close()


def test_tensorboard_is_off_when_not_wanted(tmp_path: Path) -> None:
    sinks = metrics.open_metrics_sinks(RunDirectory(tmp_path), tensorboard=False)
    sinks.write(1, {"loss": 1.0})
    sinks.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_sink_that_raises_is_switched_off_once_and_the_others_go_on() -> None:
    good, bad = Recorder(), Recorder(fails_at=2)
    warnings: list[Warned] = []
    sinks = metrics.MetricsSinks(
        {"bad": lambda: bad, "good": lambda: good}, on_warning=warnings.append
    )
    for step in (1, 2, 3):
        sinks.write(step, {"loss": 1.0})
    sinks.close()
    assert good.steps == [1, 2, 3]
    assert bad.steps == [1]
    assert (good.closed, bad.closed) == (1, 1)
    assert [w.message for w in warnings] == [
        "metrics sink bad is switched off: RuntimeError: the server hung up"
    ]


def test_a_sink_that_does_not_open_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file in the way")
    warnings: list[Warned] = []
    sinks = metrics.open_metrics_sinks(
        RunDirectory(tmp_path), tensorboard=True, on_warning=warnings.append
    )
    assert sinks.names == ("jsonl",)
    assert "metrics sink tensorboard is switched off: FileExistsError" in warnings[0].message
    sinks.close()


def test_a_sink_of_another_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site"
    meta = package / "other_sinks-1.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: other-sinks\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(
        f"[{metrics.ENTRY_POINTS}]\nother = other_sinks:open_sink\n"
    )
    (package / "other_sinks.py").write_text(
        "class Sink:\n"
        "    def __init__(self, run): self.path = run.root / 'other.txt'\n"
        "    def write(self, step, scalars): self.path.write_text(f'{step} {scalars}')\n"
        "    def close(self): pass\n"
        "open_sink = Sink\n"
    )
    monkeypatch.syspath_prepend(str(package))
    sinks = metrics.open_metrics_sinks(RunDirectory(tmp_path), tensorboard=False)
    sinks.write(7, {"loss": 1.0})
    sinks.close()
    assert (tmp_path / "other.txt").read_text() == "7 {'loss': 1.0}"


def test_the_sinks_load_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from deepopt.run_directory import RunDirectory\n"
        "from deepopt.telemetry.metrics import open_metrics_sinks\n"
        f"sinks = open_metrics_sinks(RunDirectory(Path({str(tmp_path)!r})), tensorboard=True)\n"
        "assert len(sinks.names) == 2\n"
        "sinks.write(1, {'loss': 1.0}); sinks.close()\n"
        "print(sorted({'torch', 'ray', 'tensorflow', 'grpc'} & set(sys.modules)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
