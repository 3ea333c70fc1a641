"""`deepopt plan`, `deepopt launch --plan` and what `deepopt profile` refuses: no process is started."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from deepopt.planner.plan_file import PlanFile
from deepopt.planner.plan_text import write_plan_file
from deepopt.planner.profile import BackgroundSection
from deepopt_cli.app import app
from support.fake_supervisor import FakeSupervisors
from support.plan_files import plan_file, plan_file_of

JOB = """
model: {kwargs: {num_blocks: 4, d_model: 32, num_heads: 2, expert_hidden: 16, num_experts: 4}}
worker: {count: 2, device: cpu}
training: {microbatches: 4, microbatch_size: 1}
data: {sequence_length: 16}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "hand.yaml").write_text(write_plan_file(plan_file()))
    return tmp_path


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def planned(**changes: Any) -> PlanFile:
    return plan_file_of(Path("job.yaml"), **changes)


def test_a_plan_is_shown_and_drawn(tmp_path: Path) -> None:
    result = deepopt("plan", "show", "hand.yaml", "--svg", "a.svg", "--html", "a.html")
    assert result.exit_code == 0, result.output
    assert "devices     2 x GPU" in result.stdout
    assert "blocks.0 .. blocks.2" not in result.stdout
    assert "blocks.1 .. head" in result.stdout
    assert "predicted   step" in result.stdout
    ElementTree.fromstring((tmp_path / "a.svg").read_text())
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 1
    assert "blocks.1 .. head" in page


def test_a_plan_says_what_the_warm_up_of_routers_takes_on_top(tmp_path: Path) -> None:
    file = plan_file()
    layers = [
        layer
        if layer.times_ms is None
        else layer.model_copy(
            update={"times_ms": layer.times_ms.model_copy(update={"warm_up": 7})}
        )
        for layer in file.layers
    ]
    file = file.model_copy(update={"layers": tuple(layers)})
    (tmp_path / "warm.yaml").write_text(write_plan_file(file))
    assert "warm_up: 7" in (tmp_path / "warm.yaml").read_text()
    assert "warm-up     up to" in deepopt("plan", "show", "warm.yaml").stdout
    assert "warm-up" not in deepopt("plan", "show", "hand.yaml").stdout


def test_a_plan_says_what_is_taken_of_shared_cores_beside_the_training(tmp_path: Path) -> None:
    background = (BackgroundSection(host="one", processes=0.06, threads=0.03),)
    file = plan_file()
    hardware = file.hardware.model_copy(update={"background": background, "shared_cores": 1})
    file = file.model_copy(update={"hardware": hardware})
    (tmp_path / "busy.yaml").write_text(write_plan_file(file))
    shown = " ".join(deepopt("plan", "show", "busy.yaml").stdout.split())
    assert "workers share 1 cores, of which" in shown
    assert "take 0.09" in shown
    assert "cores" not in deepopt("plan", "show", "hand.yaml").stdout


def test_an_edited_plan_is_predicted_anew(tmp_path: Path) -> None:
    before = json.loads(deepopt("plan", "show", "hand.yaml", "--json").stdout)
    text = (tmp_path / "hand.yaml").read_text()
    text = text.replace("last: blocks.0", "last: blocks.1").replace(
        "first: blocks.1", "first: blocks.2"
    )
    (tmp_path / "edited.yaml").write_text(text)
    after = json.loads(deepopt("plan", "show", "edited.yaml", "--json").stdout)
    assert after["predicted"]["stage_ms"] == [10.5, 7.0]
    assert before["predicted"]["stage_ms"] == [7.0, 10.5]
    result = deepopt("plan", "diff", "hand.yaml", "edited.yaml")
    assert result.exit_code == 1
    assert "stage 0" in result.stdout
    assert deepopt("plan", "diff", "hand.yaml", "hand.yaml").exit_code == 0
    found = json.loads(deepopt("plan", "diff", "hand.yaml", "edited.yaml", "--json").stdout)
    assert {row["what"] for row in found["differences"]} >= {"stage 0", "stage 1"}


def test_a_launch_takes_stages_order_and_costs_from_the_plan(tmp_path: Path) -> None:
    plan = planned()
    (tmp_path / "plan.yaml").write_text(write_plan_file(plan))
    result = deepopt("launch", "job.yaml", "--plan", "plan.yaml", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["costs"] == "measured"
    assert shown["plan"]["boundaries"] == list(plan.plan(plan_id=1).boundaries)
    assert shown["plan"]["placement"] == plan.pipeline.placement


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.kwargs={num_blocks: 5}", "6 layers"),
        ("training.microbatch_size=2", "microbatch_size was 1 and is 2"),
        ("worker.count=3", "a plan for 2 workers, the job has 3"),
    ],
)
def test_a_plan_for_another_job_is_refused_with_the_difference(
    tmp_path: Path, option: str, message: str
) -> None:
    (tmp_path / "plan.yaml").write_text(write_plan_file(planned()))
    result = deepopt("launch", "job.yaml", "--plan", "plan.yaml", "--set", option, "--dry-run")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_other_devices_is_refused_with_the_difference(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(write_plan_file(planned(name="another CPU")))
    result = deepopt("launch", "job.yaml", "--plan", "plan.yaml", "--dry-run")
    assert result.exit_code == 1
    assert "planned another CPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "show", "none.yaml"), "plan file none.yaml cannot be read"),
        (("launch", "job.yaml", "--plan", "none.yaml"), "plan file none.yaml cannot be read"),
        (("plan", "show", "job.yaml"), "job.yaml:1: this is no plan file"),
        (("profile", "job.yaml", "-o", "no/plan.yaml"), "--output no/plan.yaml"),
        (("profile", "job.yaml", "--workers", 9), "9 ranks need at least 9 layers"),
        (("profile", "job.yaml", "--set", "parallel.data=2", "--workers", 3), "3 workers"),
    ],
)
def test_bad_input_is_one_error(
    tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    result = deepopt(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_profile_takes_everything_down_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = FakeSupervisors()

    def spawn(run_dir: Path, *, stage_worker: str) -> int:
        pid = fakes.spawn(run_dir, steps=100_000)
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C, while the workers measure
        return pid

    module = types.ModuleType("deepopt.head.supervisor")
    module.spawn_supervisor = spawn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepopt.head.supervisor", module)
    try:
        result = deepopt("profile", "job.yaml")
        assert result.exit_code == 130, result.output
        assert "interrupted; plan.yaml was not written" in result.stderr
        assert "Traceback" not in result.output
        assert not (tmp_path / "plan.yaml").exists()
        assert not any((tmp_path / "runs").iterdir())
    finally:
        fakes.close()
