"""`deepopt top` shows a job from its run directory alone, with faults and experts, live or once."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deepopt.config import JobConfig
from deepopt.job_file import dump_job
from deepopt.launch.run_feed import RunFeed
from deepopt.launch.run_view import open_run
from deepopt.telemetry.load_map import BLOCKS
from deepopt_cli import cmd_top
from deepopt_cli.app import app
from deepopt_cli.top_picture import TopPicture
from support import fake_supervisor

GONE_PID = 2**22  # above what Linux gives by default


def expert_step(step: int, max_vio: float) -> dict[str, Any]:
    return {
        **fake_supervisor.metrics(step),
        "max_vio": max_vio,
        "max_vio_window": 0.05,
        "max_vio_unbiased": 1.9,
        "straggler_factor": 1.07,
        "gate_mass_lost": 0.031,
        "dead_experts": 2.0,
        "shrunk_experts": 0.0,
    }


def loads(step: int, **layers: list[int]) -> dict[str, Any]:
    return {"first_step": step, "step": step, "loads": layers}


FAULT = {
    "cause": "exit",
    "culprit": {"rank": 1, "host": "host-a", "pid": 4001, "stages": [1]},
    "generation": 1,
    "step": 3,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that goes on, with experts in two layers and a fault behind it."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "job.yaml").write_text(dump_job(JobConfig()))
    for step, max_vio in enumerate((1.5, 0.75, 0.25), 1):
        fake_supervisor.append(run_dir / "metrics.jsonl", expert_step(step, max_vio))
        heavy = [100 + 90 * (3 - step), 100, 100, 0]
        line = loads(step, **{"blocks.0": heavy, "blocks.1": [100] * 4})
        fake_supervisor.append(run_dir / "expert_loads.jsonl", line)
    fake_supervisor.append(
        run_dir / "events.jsonl",
        {"time": "2026-01-01T10:11:12", "kind": "state", "state": "running"},
    )
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status(faults=[FAULT]))
    return run_dir


def end(run_dir: Path, state: str = "finished") -> None:
    fake_supervisor.write(run_dir / "status.json", fake_supervisor.status(state=state))


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["top", *map(str, arguments)])


def test_everything_that_matters_is_shown_once_where_there_is_no_terminal(
    run_dir: Path,
) -> None:
    result = deepopt(run_dir)
    assert result.exit_code == 0, result.stderr
    for expected in (
        "running  generation 1",
        "step 3/5",
        "16.4k tokens/s",
        "bubble 25 %",
        "75 %",  # of rank 0's time
        "heard",
        "rank 1 on host-a",
        "MaxVio 0.25 (window 0.05, without bias 1.90)",
        "busiest device 1.07x",
        "gate mass lost 3.1 %",
        "2 dead",
        "load of each expert of blocks.0",
        "1 more, see --layer",
    ):
        assert expected in result.stdout, expected
    assert "\x1b" not in result.stdout


def test_the_map_shows_each_expert_over_the_steps(run_dir: Path) -> None:
    rows = [line for line in deepopt(run_dir).stdout.splitlines() if "|" in line]
    curve, *experts = (row[row.index("|") + 1 : row.rindex("|")] for row in rows)
    assert curve[0] == BLOCKS[-1]
    assert BLOCKS.index(curve[0]) > BLOCKS.index(curve[2])
    assert len(experts) == 4
    assert BLOCKS.index(experts[0][0]) > BLOCKS.index(experts[0][2])
    assert experts[3] == "   "  # without a token


def test_the_layer_can_be_chosen(run_dir: Path) -> None:
    text = deepopt(run_dir, "--layer", "blocks.1").stdout
    assert "load of each expert of blocks.1" in text
    assert f"0 |{BLOCKS[4] * 3}|" in text


def test_the_first_layer_is_mapped_whoever_told_first(run_dir: Path) -> None:
    line = loads(3, **{"blocks.10": [1, 2, 3, 4]})
    told = run_dir / "expert_loads.jsonl"
    told.write_text(json.dumps(line) + "\n" + told.read_text())
    text = deepopt(run_dir, "--layer", "none").stderr
    assert "known: blocks.0, blocks.1, blocks.10" in text
    assert "load of each expert of blocks.0" in deepopt(run_dir).stdout


def test_an_unknown_layer_is_one_error_that_names_those_there_are(run_dir: Path) -> None:
    result = deepopt(run_dir, "--layer", "blocks.7")
    assert result.exit_code == 1
    assert "'blocks.7' has no experts" in result.stderr
    assert "known: blocks.0, blocks.1" in result.stderr


def test_a_terminal_without_blocks_gets_characters() -> None:
    picture = TopPicture(title="run", only_ascii=True)
    picture.status(fake_supervisor.status(workers=[], last_step=None))
    picture.step(expert_step(1, 0.5))
    picture.loads(loads(1, **{"blocks.0": [10, 20, 0]}))
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as captured:
        console.print(picture.render())
    assert captured.get().isascii()
    assert "('=' even, '@' twice)" in captured.get()


def test_json_is_one_object(run_dir: Path) -> None:
    found = json.loads(deepopt(run_dir, "--json").stdout)
    assert found["status"]["state"] == "running"
    assert found["last_step"]["step"] == 3
    assert found["experts"]["last"]["dead_experts"] == 2
    assert found["supervisor_alive"] is False


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(dump_job(JobConfig()))
    assert "starting" in deepopt(tmp_path).stdout
    assert json.loads(deepopt(tmp_path, "--json").stdout)["experts"] is None


def test_no_run_directory_is_one_error(tmp_path: Path) -> None:
    result = deepopt(tmp_path / "none")
    assert result.exit_code == 1
    assert "does not exist" in result.stderr


class Seen:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def status(self, status: Any) -> None: ...
    def event(self, record: Any) -> None: ...
    def loads(self, record: Any) -> None: ...
    def step(self, record: Any) -> None:
        self.steps.append(record["step"])


def test_each_look_hands_over_what_is_new_until_the_job_has_ended(run_dir: Path) -> None:
    feed, seen = RunFeed(open_run(run_dir)), Seen()
    assert feed.look(seen)
    assert seen.steps == [1, 2, 3]
    fake_supervisor.append(run_dir / "metrics.jsonl", expert_step(4, 0.1))
    end(run_dir)
    assert not feed.look(seen)
    assert seen.steps == [1, 2, 3, 4]


def test_a_job_whose_supervisor_is_gone_has_nothing_more_to_come(run_dir: Path) -> None:
    fake_supervisor.write_supervisor(run_dir, pid=GONE_PID, start_time=1)
    assert not RunFeed(open_run(run_dir)).look(Seen())
    assert f"its supervisor is gone: deepopt resume {run_dir}" in " ".join(
        deepopt(run_dir).stdout.split()
    )


def live(run_dir: Path, monkeypatch: pytest.MonkeyPatch, at_sleep: Any) -> str:
    """What a terminal shows; `at_sleep` stands in for the waiting between two looks."""
    monkeypatch.setattr(cmd_top.time, "sleep", at_sleep)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120, height=40)
    feed, picture = RunFeed(open_run(run_dir)), TopPicture(title="run")
    assert feed.look(picture)
    cmd_top._stay(feed, picture, console)
    return terminal.getvalue()


def test_the_live_picture_ends_with_the_job(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def at_sleep(seconds: float) -> None:
        waits.append(seconds)
        end(run_dir)

    text = live(run_dir, monkeypatch, at_sleep)
    assert waits == [cmd_top.POLL_S]
    assert "the job goes on" in text


def test_ctrl_c_leaves_and_touches_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    before = sorted(path.name for path in run_dir.iterdir())
    assert "the job goes on" in live(run_dir, monkeypatch, at_sleep)
    assert sorted(path.name for path in run_dir.iterdir()) == before
