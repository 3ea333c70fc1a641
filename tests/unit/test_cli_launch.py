"""`launch`, `resume`, `init` and `schema` up to the supervisor, which is a fake here."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepopt.errors import ClusterError
from deepopt.job_file import load_job
from deepopt.planner.plan import Plan
from deepopt.planner.plan_text import write_plan_file
from deepopt.planner.skeleton import ModelSkeleton
from deepopt_cli import attend
from deepopt_cli.app import app
from support import fake_supervisor
from support.fake_supervisor import FakeSupervisors
from support.plan_files import plan_file_of

MODEL = """
from torch import nn

def build(width=8, depth=6):
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])

def loss(output, targets):
    return output.mean()
"""


class Supervision:
    """Stands for `deepopt.head.supervisor`; remembers what it was asked to start."""

    def __init__(self) -> None:
        self.fakes = FakeSupervisors()
        self.scenario: dict[str, Any] = {}
        self.started: list[Path] = []
        self.error: Exception | None = None

    def spawn_supervisor(self, run_dir: Path, *, stage_worker: str = "") -> int:
        if self.error is not None:
            raise self.error
        self.started.append(run_dir)
        return self.fakes.spawn(run_dir, **{"steps": 3, "step_s": 0.01, **self.scenario})


@pytest.fixture
def supervision(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervision]:
    supervision = Supervision()
    module = types.ModuleType("deepopt.head.supervisor")
    module.spawn_supervisor = supervision.spawn_supervisor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepopt.head.supervisor", module)
    yield supervision
    supervision.fakes.close()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a text and a job file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    (tmp_path / "my_model.py").write_text(MODEL)
    (tmp_path / "text.txt").write_text("to be or not to be " * 100)
    (tmp_path / "job.yaml").write_text(
        "name: tiny\n"
        "model: {factory: my_model:build, loss: my_model:loss}\n"
        "data: {files: [text.txt], sequence_length: 16}\n"
        "worker: {count: 2}\n"
        "pipeline: {placement: mirror, schedule: bi_stream}\n"  # a search takes a second
    )
    return tmp_path


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def launch(*arguments: object) -> Any:
    return deepopt("launch", "job.yaml", "--run-dir", "run", *arguments)


def test_a_launch_writes_job_model_and_plan_and_shows_the_job_to_its_end(
    supervision: Supervision, here: Path
) -> None:
    result = launch()
    assert result.exit_code == 0, result.stderr
    assert supervision.started == [here / "run"]
    job = load_job(here / "run" / "job.yaml")
    assert job.worker.count == 2
    assert job.training.groups == 2  # resolved, so that no later launch changes it
    assert job.data.files == (str(here / "text.txt"),)  # the same from every folder
    plan = Plan.from_json(json.loads((here / "run" / "plan.json").read_text()))
    assert (plan.plan_id, plan.pipeline_size, len(plan.layer_names)) == (1, 2, 6)
    model = ModelSkeleton.from_json(json.loads((here / "run" / "model.json").read_text()))
    assert model.num_parameters == 6 * (8 * 8 + 8)
    for expected in (
        "my_model:build",
        "text.txt",
        "placement mirror",
        "step 3/3",
        "finished at",
    ):
        assert expected in result.stdout, expected


def test_options_win_over_the_job_file(supervision: Supervision, here: Path) -> None:
    line = ("--set", "pipeline.placement=line", "--set", "pipeline.schedule=1f1b")
    result = launch("--workers", 3, "--steps", 7, *line)
    assert result.exit_code == 0, result.stderr
    job = load_job(here / "run" / "job.yaml")
    assert (job.worker.count, job.training.steps, job.pipeline.placement) == (3, 7, "line")


def test_without_a_run_dir_a_new_one_is_made_for_each_launch(
    supervision: Supervision, here: Path
) -> None:
    for _ in range(2):
        assert deepopt("launch", "job.yaml", "--detach").exit_code == 0
    first, second = supervision.started
    assert first != second
    assert first.parent == here / "runs"
    assert first.name.startswith("tiny-")


def test_a_detached_launch_says_where_to_find_the_job(
    supervision: Supervision, here: Path
) -> None:
    shown = launch("--detach").stdout
    assert "deepopt logs -f run" in shown
    assert "finished" not in shown


def test_a_detached_launch_in_json(supervision: Supervision, here: Path) -> None:
    shown = json.loads(launch("--detach", "--json").stdout)
    assert shown["run_dir"] == str(here / "run")
    assert shown["supervisor_pid"] > 0


def test_a_detached_supervisor_that_dies_at_once_is_reported(
    supervision: Supervision, here: Path
) -> None:
    supervision.scenario = {"stillborn": True, "log": "no module named ray"}
    result = launch("--detach")
    assert result.exit_code == 3
    assert "is gone; the job was starting at step 0" in result.stderr
    assert "no module named ray" in result.stderr


def test_a_full_disk_is_named_where_a_supervisor_vanishes(
    supervision: Supervision, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervision.scenario = {"stillborn": True}
    full = types.SimpleNamespace(total=1 << 30, used=1 << 30, free=0)
    monkeypatch.setattr(attend.shutil, "disk_usage", lambda folder: full)
    result = launch("--detach")
    assert result.exit_code == 3
    assert "no space is left on the disk of run" in result.stderr
    assert "hint: make room there; then deepopt resume run" in result.stderr


def test_a_detached_job_can_be_stopped_at_once(supervision: Supervision, here: Path) -> None:
    supervision.scenario = {"steps": 10_000}
    assert launch("--detach").exit_code == 0
    result = deepopt("stop", "run")
    assert result.stdout.startswith("stopped at step"), result.stderr


def test_json_puts_nothing_else_on_stdout(supervision: Supervision, here: Path) -> None:
    lines = [json.loads(line) for line in launch("--json").stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[-1]["state"] == "finished"


def test_a_dry_run_shows_plan_and_schedule_and_leaves_no_trace(
    supervision: Supervision, here: Path
) -> None:
    before = sorted(here.iterdir())
    searched = ("--set", "pipeline.schedule=auto", "--set", "pipeline.placement=auto")
    result = launch("--dry-run", *searched)
    assert result.exit_code == 0, result.stderr
    assert "rank 0" in result.stdout
    assert "dry run: nothing was started" in result.stdout
    shown = json.loads(launch("--dry-run", "--json", *searched).stdout)
    assert "compared, by simulated step time (estimated costs):" in result.stdout
    fitting = [row for row in shown["compared"] if "step_s" in row]
    assert fitting[0]["placement"].startswith(shown["plan"]["placement"])
    assert fitting[0]["step_s"] == min(row["step_s"] for row in fitting)
    assert shown["job"]["name"] == "tiny"
    assert supervision.started == []
    assert [path for path in sorted(here.iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.stepz=3"], "training.stepz: unknown key"),
        (["--set", "model.factory=nowhere:build"], "there is no module 'nowhere'"),
        (["--set", "data.files=[nothing*.txt]"], "matches no file"),
        (["--set", "data.sequence_length=100000"], "less than one sequence"),
        (["--set", "data.files=[]", "--set", "data.dataset=my_model:nope"], "has no 'nope'"),
        (["--workers", "7"], "7 stages need at least 7 layers, the model has 6"),
        (["--set", "parallel.data=3"], "2 workers cannot form 3 replicas"),
        (
            ["--set", "training.groups=3", "--set", "pipeline.placement=mirror"],
            "3 gradient groups",
        ),
        (["--set", "pipeline.schedule=1f1c"], "'1f1c' is not a schedule"),
        (["--hostfile", "hosts"], "cannot read hostfile"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    supervision: Supervision, here: Path, arguments: list[str], message: str
) -> None:
    if "--hostfile" in arguments:
        (here / "job.yaml").write_text("model: {factory: my_model:build}\n")
    result = launch(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (here / "run").exists()
    assert supervision.started == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    supervision: Supervision, here: Path
) -> None:
    (here / "job.yaml").write_text("model: {kwargs: {vocab_size: 100}}\n")
    result = launch("--dry-run")
    assert result.exit_code == 1
    assert "bytes has 256 tokens, the model's embed.weight has rows for 100" in result.stderr


def test_a_machine_without_ray_is_told_how_to_get_it(
    supervision: Supervision, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepopt.launch.preparation.find_spec", lambda name: None)
    result = launch()
    assert result.exit_code == 3
    assert result.stderr == "error: ray is not installed\n\nhint: pip install ray\n"
    assert not (here / "run").exists()


def test_a_cluster_whose_size_is_unknown_needs_a_number_of_workers(
    supervision: Supervision, here: Path
) -> None:
    (here / "job.yaml").write_text("model: {factory: my_model:build}\n")
    result = launch("--address", "10.0.0.1:6379")
    assert result.exit_code == 1
    assert "hint: add --workers N" in result.stderr


def test_the_slots_of_a_hostfile_are_the_workers(supervision: Supervision, here: Path) -> None:
    (here / "job.yaml").write_text("model: {factory: my_model:build, loss: my_model:loss}\n")
    (here / "hosts").write_text("a slots=1\nb slots=2\n")
    shown = json.loads(launch("--hostfile", "hosts", "--dry-run", "--json").stdout)
    assert shown["job"]["worker"]["count"] == 3
    assert shown["job"]["cluster"]["hostfile"] == str(here / "hosts")


def test_a_used_run_dir_is_refused_with_the_way_on(
    supervision: Supervision, here: Path
) -> None:
    assert launch("--detach").exit_code == 0
    again = launch()
    assert again.exit_code == 1
    assert "run directory run holds a job already" in again.stderr
    assert "deepopt resume run" in again.stderr
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("")
    refused = deepopt("launch", "job.yaml", "--run-dir", "full")
    assert "run directory full is not empty" in refused.stderr
    assert [path.name for path in (here / "full").iterdir()] == ["thesis.tex"]


def test_a_supervisor_that_cannot_start_leaves_no_run_dir(
    supervision: Supervision, here: Path
) -> None:
    supervision.error = ClusterError("port 6379 is taken", remedy="free it")
    result = launch()
    assert result.exit_code == 3
    assert result.stderr == "error: port 6379 is taken\n\nhint: free it\n"
    assert not (here / "run").exists()


# --- resume ----------------------------------------------------------------------------------


@pytest.fixture
def stopped(supervision: Supervision, here: Path) -> Path:
    """A job that was stopped at step 3 of 60."""
    supervision.scenario = {"end": "stopped"}
    assert launch().exit_code == 0
    supervision.scenario = {"start_step": 3, "steps": 5}
    return here / "run"


def test_resume_makes_a_new_plan_for_other_workers_and_keeps_the_groups(
    supervision: Supervision, stopped: Path
) -> None:
    result = deepopt("resume", "run", "--workers", 4, "--steps", 5)
    assert result.exit_code == 0, result.stderr
    plan = json.loads((stopped / "plan.json").read_text())
    assert (plan["plan_id"], plan["pipeline_size"], plan["num_groups"]) == (2, 4, 2)
    job = load_job(stopped / "job.yaml")
    assert (job.worker.count, job.training.steps) == (4, 5)
    assert "step 4/5" in result.stdout
    assert "step 3/" not in result.stdout  # of the first launch
    assert supervision.started == [stopped, stopped]


def test_resume_takes_the_workers_of_before(supervision: Supervision, stopped: Path) -> None:
    assert deepopt("resume", "run", "--json").exit_code == 0
    assert json.loads((stopped / "plan.json").read_text())["pipeline_size"] == 2


def test_resume_keeps_to_the_plan_file_until_something_else_is_asked_for(
    supervision: Supervision, here: Path
) -> None:
    sys.path.insert(0, str(here))  # as the launch does
    made = plan_file_of(here / "job.yaml")
    first, second = made.stages
    move = {"last": "0"}, {"first": "1"}  # no split that anyone would choose
    stages = (first.model_copy(update=move[0]), second.model_copy(update=move[1]))
    edited = made.model_copy(update={"stages": stages})
    (here / "plan.yaml").write_text(write_plan_file(edited))
    supervision.scenario = {"end": "stopped"}
    result = launch("--plan", "plan.yaml")
    assert result.exit_code == 0, result.output
    (here / "plan.yaml").unlink()  # the run directory has what it needs

    def resumed(*arguments: object) -> list[int]:
        result = deepopt("resume", "run", *arguments)
        assert result.exit_code == 0, result.output
        boundaries: list[int] = json.loads((here / "run/plan.json").read_text())["boundaries"]
        return boundaries

    assert resumed() == [0, 1]
    assert resumed("--set", "logging.tensorboard=false") == [0, 1]
    assert resumed("--workers", 4) != [0, 1]
    assert not (here / "run/plan.yaml").exists()
    (here / "other.yaml").write_text(write_plan_file(edited))
    assert resumed("--workers", 2, "--plan", "other.yaml") == [0, 1]
    assert (here / "run/plan.yaml").read_text() == (here / "other.yaml").read_text()


def test_a_plan_is_predicted_on_emulated_devices_as_fast_as_the_job_says(
    supervision: Supervision, here: Path
) -> None:
    sys.path.insert(0, str(here))  # as the launch does
    job_file = here / "job.yaml"
    text = job_file.read_text().replace("count: 2", "count: 2, device: emulated")
    job_file.write_text(text.replace("bi_stream}", "bi_stream, calibrate: false}"))
    (here / "plan.yaml").write_text(write_plan_file(plan_file_of(job_file)))

    def predicted_s(folder: str, *arguments: object) -> float:
        result = deepopt(
            "launch",
            "job.yaml",
            "--plan",
            "plan.yaml",
            "--run-dir",
            folder,
            "--json",
            *arguments,
        )
        assert result.exit_code == 0, result.output
        step_s: float = json.loads((here / folder / "prediction.json").read_text())["step_s"]
        return step_s

    even_s = predicted_s("even")
    slow_s = predicted_s("slow", "--set", "emulation.rank_factor=[2,2]")
    assert slow_s == pytest.approx(2 * even_s, rel=0.01)  # all but the exchange


def test_resume_plans_anew_where_the_plan_file_is_of_other_devices(
    supervision: Supervision, here: Path
) -> None:
    sys.path.insert(0, str(here))
    (here / "plan.yaml").write_text(write_plan_file(plan_file_of(here / "job.yaml")))
    supervision.scenario = {"end": "stopped"}
    assert launch("--plan", "plan.yaml").exit_code == 0
    other = plan_file_of(here / "job.yaml", name="another CPU")
    (here / "run/plan.yaml").write_text(write_plan_file(other))
    result = deepopt("resume", "run")
    assert result.exit_code == 0, result.output
    assert "note: planned anew" in result.stderr
    assert "planned another CPU" in result.stderr
    refused = deepopt("resume", "run", "--plan", "none.yaml")
    assert refused.exit_code == 1
    assert "plan file none.yaml cannot be read" in refused.stderr


def test_resume_from_another_folder_still_finds_the_model(
    supervision: Supervision,
    stopped: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.delitem(sys.modules, "my_model")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(stopped.parent)])
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    result = deepopt("resume", stopped)
    assert result.exit_code == 0, result.stderr
    # The supervisor and its workers inherit it.
    wanted = [str(stopped.parent), str(elsewhere), "/inherited"]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == wanted


def test_a_job_without_code_of_its_own_leaves_the_import_path_alone(
    supervision: Supervision, here: Path
) -> None:
    (here / "job.yaml").write_text("data: {files: [text.txt], sequence_length: 16}\n")
    assert launch("--detach").exit_code == 0
    assert os.environ["PYTHONPATH"] == "/inherited"
    assert str(here) not in sys.path


def test_a_request_that_an_earlier_launch_did_not_read_ends_no_later_one(
    supervision: Supervision, stopped: Path
) -> None:
    fake_supervisor.write(stopped / "requests" / "late.json", {"kind": "kill"})
    result = deepopt("resume", "run")
    assert result.exit_code == 0
    assert "finished at step 5" in result.stdout


def test_resume_may_change_how_but_not_what(supervision: Supervision, stopped: Path) -> None:
    refused = deepopt("resume", "run", "--set", "training.seed=1")
    assert refused.exit_code == 1
    assert "resume cannot change training.seed" in refused.stderr
    line = ("--set", "pipeline.placement=line", "--set", "pipeline.schedule=1f1b")
    assert deepopt("resume", "run", *line).exit_code == 0
    assert load_job(stopped / "job.yaml").pipeline.placement == "line"


def test_resume_chooses_stages_and_order_again_where_the_job_left_them_open(
    supervision: Supervision, here: Path
) -> None:
    supervision.scenario = {"end": "stopped"}
    free = ("pipeline.schedule=auto", "pipeline.placement=auto", "pipeline.calibrate=false")
    assert launch(*(word for change in free for word in ("--set", change))).exit_code == 0
    result = deepopt("resume", "run", "--workers", 3, "--set", "pipeline.placement=line")
    assert result.exit_code == 0, result.stderr
    plan = json.loads((here / "run/plan.json").read_text())
    assert (plan["pipeline_size"], plan["placement"]) == (3, "line")
    assert load_job(here / "run/job.yaml").pipeline.schedule == "auto"


@pytest.mark.parametrize(
    ("launched", "asked", "freed"),
    [
        (
            ["pipeline.schedule=bi_stream"],
            ["--workers", "3", "--set", "pipeline.placement=line"],
            ["pipeline.schedule=auto"],
        ),
        (
            ["pipeline.boundaries=[0, 3]", "parallel.pipeline=2"],
            ["--workers", "3"],
            ["pipeline.boundaries=null", "parallel.pipeline=null"],
        ),
    ],
)
def test_resume_says_what_of_the_launch_does_not_fit_and_how_to_free_it(
    supervision: Supervision,
    here: Path,
    launched: list[str],
    asked: list[str],
    freed: list[str],
) -> None:
    supervision.scenario = {"end": "stopped"}
    options = [word for change in launched for word in ("--set", change)]
    assert launch(*options).exit_code == 0
    refused = deepopt("resume", "run", *asked)
    assert refused.exit_code == 1
    assert "is what the job was launched with" in refused.stderr
    command = refused.stderr.partition("deepopt resume ")[2].split()
    assert all(change in command for change in freed), refused.stderr
    result = deepopt("resume", *command)
    assert result.exit_code == 0, result.stderr
    assert json.loads((here / "run/plan.json").read_text())["pipeline_size"] == 3


def test_resume_of_a_job_that_had_shrunk_says_how_to_ask_for_fewer(
    supervision: Supervision, here: Path
) -> None:
    supervision.scenario = {"end": "stopped"}
    assert launch("--workers", 3).exit_code == 0
    plan = Plan.from_json(json.loads((here / "run/plan.json").read_text()))
    left = replace(plan, pipeline_size=2, boundaries=plan.boundaries[:2])  # the head's, shrunk
    (here / "run/plan.json").write_text(json.dumps(left.to_json()))
    fewer = deepopt("resume", "run", "--workers", 2)
    assert "shrunk" not in fewer.stderr
    (here / "run/plan.json").write_text(json.dumps(left.to_json()))
    result = deepopt("resume", "run", "--workers", 3)
    assert "shrunk" not in result.stderr  # it is what was asked for
    (here / "run/plan.json").write_text(json.dumps(left.to_json()))
    result = deepopt("resume", "run")
    assert result.exit_code == 0, result.stderr
    assert "had shrunk to 2 of 3 workers" in result.stderr
    assert "--workers 2" in result.stderr
    assert json.loads((here / "run/plan.json").read_text())["pipeline_size"] == 3


def test_resume_of_a_living_job_joins_it_and_starts_nothing(
    supervision: Supervision, here: Path
) -> None:
    supervision.scenario = {"steps": 150}
    assert launch("--detach").exit_code == 0
    shown = json.loads(deepopt("resume", "run", "--detach", "--json").stdout)
    assert shown["supervisor_alive"] is True
    result = deepopt("resume", "run")
    assert result.exit_code == 0
    assert "the job runs: " in result.stdout
    assert "joined it" in result.stdout
    assert "finished at step 150" in result.stdout


def test_a_living_job_is_not_changed_by_a_resume(supervision: Supervision, here: Path) -> None:
    supervision.scenario = {"steps": 10_000}
    assert launch("--detach").exit_code == 0
    result = deepopt("resume", "run", "--workers", 2)
    assert result.exit_code == 1
    assert "cannot take worker.count=2 while it does" in result.stderr
    assert "deepopt stop run" in result.stderr


def test_resume_of_a_finished_job_says_so_and_may_go_further(
    supervision: Supervision, here: Path
) -> None:
    assert launch("--steps", 3).exit_code == 0
    done = deepopt("resume", "run")
    assert (done.exit_code, len(supervision.started)) == (0, 1)
    assert "nothing to do: the job is finished at step 3, asked for 3" in done.stdout
    assert json.loads(deepopt("resume", "run", "--json").stdout)["state"] == "finished"
    assert deepopt("resume", "run", "--steps", 6).exit_code == 0
    assert len(supervision.started) == 2


def test_resume_with_another_model_is_refused_by_its_first_difference(
    supervision: Supervision, stopped: Path, here: Path
) -> None:
    del sys.modules["my_model"]
    (here / "my_model.py").write_text(MODEL.replace("width=8", "width=16"))
    result = deepopt("resume", "run")
    assert result.exit_code == 1
    assert "0.weight had shape [8, 8] and has [16, 16]" in result.stderr
    assert json.loads((stopped / "plan.json").read_text())["plan_id"] == 1


def test_resume_needs_a_whole_run_directory(supervision: Supervision, stopped: Path) -> None:
    (stopped / "plan.json").unlink()
    assert "lacks plan.json" in deepopt("resume", "run").stderr
    result = deepopt("resume", "nowhere")
    assert result.exit_code == 1
    assert "run directory nowhere does not exist" in result.stderr


def test_resume_says_how_to_go_on_where_it_cannot_write(
    supervision: Supervision, stopped: Path
) -> None:
    (stopped / "plan.yaml").mkdir()  # a file of the run directory that cannot be replaced
    result = deepopt("resume", "run", "--steps", 5)
    assert result.exit_code == 1
    assert f"error: cannot write run directory {stopped}: " in result.stderr
    assert "hint: make it writable" in result.stderr


# --- init and schema -------------------------------------------------------------------------


def test_init_writes_a_job_file_that_launches_and_never_overwrites(here: Path) -> None:
    result = deepopt("init", "new.yaml")
    assert result.exit_code == 0
    assert load_job(here / "new.yaml").training.steps > 0
    again = deepopt("init", "new.yaml")
    assert again.exit_code == 1
    assert "new.yaml exists and is not overwritten" in again.stderr
    assert "deepopt init new-2.yaml" in again.stderr
    assert "folder nowhere does not exist" in deepopt("init", "nowhere/job.yaml").stderr


def test_init_into_a_folder_says_which_file_it_would_be(here: Path) -> None:
    (here / "jobs").mkdir()
    result = deepopt("init", "jobs")
    assert result.exit_code == 1
    assert result.stderr == "error: jobs is a folder\n\nhint: deepopt init jobs/job.yaml\n"


def test_schema_is_a_json_schema_of_the_job() -> None:
    shown = json.loads(deepopt("schema").stdout)
    assert "training" in shown["properties"]
