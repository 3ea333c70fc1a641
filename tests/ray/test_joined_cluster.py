"""Jobs in a Ray that others use too: what the head does when real processes die, hang or fail.

One foreign cluster serves all tests of this module; the last one looks whether it is as before.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepopt.cluster.process_table import find_process
from support.ray_jobs import TESTS, RunningJob, foreign_ray, write_run

pytestmark = pytest.mark.ray

SLOTS = 3
Launch = Callable[..., RunningJob]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    with foreign_ray(slots=SLOTS) as environment:
        yield environment


@pytest.fixture
def launch(
    cluster: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launch]:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    launched: list[RunningJob] = []

    def launch(*, num_workers: int = 2, **job: Any) -> RunningJob:
        sections = {
            "training": {"steps": 10_000},
            "cluster": {"address": cluster["ADDRESS"], "start_timeout_s": 60.0},
            "logging": {"tensorboard": False},
        }
        run = write_run(tmp_path / "run", num_workers=num_workers, job={**sections, **job})
        launched.append(RunningJob(run))
        return launched[-1]

    yield launch
    for job in launched:
        job.process.send(signal.SIGTERM)
        job.process.send(signal.SIGTERM)
        job.wait()


def fault(kind: str, *, rank: int, step: int) -> dict[str, Any]:
    return {"inject": [{kind: {"rank": rank, "step": step}}]}


def runs(pid: int) -> bool:
    """Whether a process runs; one that the foreign Ray has yet to wait for does not."""
    found = find_process(pid)
    return found is not None and found.is_alive()


def test_a_killed_worker_is_replaced_and_a_kill_ends_the_job(launch: Launch) -> None:
    job = launch(faults=fault("kill", rank=1, step=3))
    status = job.wait_for(lambda s: s["generation"] == 2 and s["state"] == "running")
    assert status["restarts"] == 1
    assert [worker["rank"] for worker in status["workers"]] == [0, 1]
    (lost,) = [event for event in job.events("worker_lost") if event["failure"] != "peer"]
    assert (lost["rank"], lost["failure"]) == (1, "death")
    (judged,) = job.events("fault")
    assert (judged["fault"]["cause"], judged["fault"]["culprit"]["rank"]) == ("exit", 1)
    pids = {worker["pid"] for worker in status["workers"]}
    assert lost["pid"] not in pids
    log = job.run.rank_log(1).read_text()
    assert f"set up {lost['pid']}" in log
    assert any(f"set up {pid}" in log for pid in pids)
    job.request("kill")
    assert job.wait() == 130
    assert job.status["state"] == "stopped"
    assert [pid for pid in pids if runs(pid)] == []


def test_a_stopped_worker_is_killed_and_replaced(launch: Launch) -> None:
    faults = {"heartbeat_s": 0.1, "heartbeat_timeout_s": 1.5, "max_restarts": 1}
    job = launch(faults={**faults, **fault("stop", rank=0, step=2)})
    job.wait_for(lambda s: s["generation"] == 2 and s["state"] == "running")
    (lost,) = [event for event in job.events("worker_lost") if event["failure"] != "peer"]
    assert (lost["rank"], lost["failure"]) == (0, "hang")
    (judged,) = job.events("fault")
    assert (judged["fault"]["cause"], judged["fault"]["culprit"]["rank"]) == ("stopped", 0)
    assert not runs(lost["pid"])


def test_an_error_of_the_model_fails_the_job_with_its_traceback(launch: Launch) -> None:
    job = launch(faults=fault("raise", rank=1, step=2))
    assert job.wait() == 5
    status = job.status
    assert (status["state"], status["generation"], status["restarts"]) == ("failed", 1, 0)
    culprit = status["error"]["culprit"]
    assert (culprit["rank"], culprit["step"], culprit["action"]) == (1, 2, "1F0")
    assert "TrainingError: the fault script raised" in culprit["traceback"]


def test_a_crash_is_told_by_its_signal_and_stack(launch: Launch) -> None:
    job = launch(num_workers=1, model={"kwargs": {"crash_at": 2}}, faults={"max_restarts": 0})
    assert job.wait() == 4
    culprit = job.status["error"]["culprit"]
    assert culprit["message"] == "its process crashed: Segmentation fault"
    assert "ray_stage_worker.py" in culprit["traceback"]


def test_a_job_is_stopped_with_a_checkpoint_and_resumed_to_its_end(launch: Launch) -> None:
    job = launch(num_workers=1)
    job.wait_for(lambda s: s["step"] > 2)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == 0
    status = job.status
    assert (status["state"], status["checkpoint_step"]) == ("stopped", status["step"])
    done = status["step"]
    job = launch(num_workers=1, training={"steps": done + 3})
    assert job.wait() == 0
    status = job.status
    assert (status["state"], status["generation"], status["step"]) == ("finished", 2, done + 3)
    assert (job.run.final / "from").read_text() == f"step-{done + 3:08d}"


def test_too_few_slots_are_refused_with_what_was_asked_and_found(launch: Launch) -> None:
    job = launch(num_workers=4)
    assert job.wait() == 3
    status = job.status
    assert status["state"] == "failed"
    assert (
        f"asked for 4 workers, found {SLOTS} CPU slots on 1 host" in status["error"]["message"]
    )


SCRIPT = """
import json, os, torch
from pathlib import Path
from deepopt import DeepTrainer
from deepopt.errors import DeepoptError
from deepopt.telemetry.files import read_json

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
rows = [(torch.randn(4), torch.randn(4)) for _ in range(11)]

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(rows)
    def __getitem__(self, index):
        return rows[index]

def mean_square(output, targets):
    return (output - targets).square().mean()

def no_number(output, targets):
    return mean_square(output, targets) * float("nan")

given = dict(
    workers=2, placement="bi_stream", batch_size=4, microbatches=2, address=os.environ["ADDRESS"],
    progress=False, drop_last=True,
)
trainer = DeepTrainer(model, loss_fn=mean_square, name="forwards", **given)
loss, outputs = trainer.evaluate(Rows()), trainer.predict(Rows())
inputs, targets = (torch.stack(column) for column in zip(*rows))
with torch.no_grad():
    expected = torch.cat([model(part) for part in inputs[:10].split(2)])
    whole = mean_square(model(inputs), targets)
before = [p.clone() for p in model.parameters()]
try:
    DeepTrainer(model, loss_fn=no_number, **given).fit(Rows())
except DeepoptError as error:
    failed = [type(error).__name__, str(error), error.__notes__[-1]]
print(json.dumps({
    "same": torch.equal(outputs[:10], expected), "rows": len(outputs), "off": abs(loss - whole.item()),
    "steps": [read_json(path)["step"] for path in Path("runs").glob("forwards-*/status.json")],
    "failed": failed, "kept": all(map(torch.equal, before, model.parameters())),
}))
"""


def test_a_script_evaluates_predicts_and_fails_in_a_cluster_of_others(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env={**os.environ, **cluster},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["same"], said["rows"], said["steps"]) == (True, 11, [1, 1])
    assert said["off"] < 1e-6
    kind, message, hint = said["failed"]
    assert (kind, said["kept"]) == ("TrainingError", True)
    assert "failed in step 1: " in message
    assert "the loss of micro-batch 0 is nan" in message
    assert hint.startswith("hint: ")


def test_the_foreign_cluster_is_as_before(
    cluster: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    program = (
        "import ray, time\n"
        f"ray.init('{cluster['ADDRESS']}', log_to_driver=False, configure_logging=False)\n"
        "def found():\n"
        "    actors = ray.util.list_named_actors(all_namespaces=True)\n"
        "    return ray.available_resources().get('CPU'), actors\n"
        "until = time.monotonic() + 60\n"
        "while found() != (3.0, []) and time.monotonic() < until:\n"
        "    time.sleep(0.1)\n"
        "print(*found())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "3.0 []\n", done
