"""`deepopt launch train.py`: a script's fit over the workers of the launch, stopped by Ctrl-C like a job."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml

from support import launcher

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = """
import sys
import torch
from deepopt.trainer import DeepTrainer

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(6)]
DeepTrainer(model, optimizer={"learning_rate": float(sys.argv[1])}).fit(data, epochs=10**6)
print("not reached")
"""


def test_ctrl_c_stops_the_fit_with_a_checkpoint_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    run = tmp_path / "run"
    process = launcher.start(
        "launch", tmp_path / "train.py", "--workers", 2, "--run-dir", run,
        "--set", "training.seed=3", "--", "2e-4",
    )  # fmt: skip
    launcher.wait_for_file(run, lambda status: (status.get("step") or 0) > 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=launcher.TIMEOUT_S)
    assert process.returncode == 130, output
    assert "not reached" not in output
    assert "Traceback" not in output
    status = launcher.status(run)
    assert status["state"] == "stopped"
    assert status["checkpoint_step"] == status["step"]
    job = yaml.safe_load((run / "job.yaml").read_text())
    assert job["worker"]["count"] == 2
    assert job["training"]["seed"] == 3
    assert job["optimizer"]["learning_rate"] == 2e-4
    assert launcher.processes_of(run) == []
