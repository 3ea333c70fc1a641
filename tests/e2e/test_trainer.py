"""`DeepTrainer` in scripts: real workers, the run directory of a launched job, weights back in the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import launcher

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

# Without a guard, and with everything that is carried defined in it.
SCRIPT = """
import json, sys
import torch
from deepopt import convert_to_deepopt
from deepopt.trainer import Callback, DeepTrainer

class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        src, tgt = torch.randn(5, 16, generator=generator), torch.randn(4, 16, generator=generator)
        return (src, tgt), tgt.flip(0)

def mean_square(output, targets):
    return (output - targets).square().mean()

class Seen(Callback):
    epochs, ended = [], None
    def on_epoch(self, trainer, epoch):
        self.epochs.append(epoch)
    def on_end(self, trainer, result):
        self.ended = result.state

torch.manual_seed(0)
model = torch.nn.Transformer(16, 2, 4, 4, 32, dropout=0.0, batch_first=True)
seen = Seen()
trainer = DeepTrainer(
    model=convert_to_deepopt(model, parallel_mode="bi_stream"),
    elb_config={"alpha": 0.3, "monitor_freq": 100},
    device_map={"cpu0": [0, 1], "cpu1": [3, 2], "cpu2": [4, 5], "cpu3": [6, 7]},
    loss_fn=mean_square, batch_size=8, microbatches=8, grad_clip=0.5, callbacks=[seen],
    run_dir=sys.argv[1], settings={"logging": {"peak_flops": 1e9}},
)
result = trainer.fit(Pairs(), epochs=2)

print(json.dumps({
    "state": result.state, "step": result.step, "losses": result.losses,
    "epochs": seen.epochs, "ended": seen.ended,
    "weights": float(sum(p.double().sum() for p in model.parameters())),
}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A script's fit over four workers: its run directory, what it said, and its stderr."""
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "train.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "train.py", "run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=launcher.TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_fit_trains_and_tells_its_callbacks(trained: Any) -> None:
    run, said, stderr = trained
    assert (said["state"], said["step"], said["ended"]) == ("finished", 6, "finished")
    assert said["epochs"] == [1, 2]
    assert said["losses"] == list(launcher.losses(run).values())
    assert said["losses"][-1] < said["losses"][0]
    assert "step 1/6  loss " in stderr


def test_the_weights_are_back_in_the_model(trained: Any) -> None:
    from safetensors.torch import load_file

    run, said, _ = trained
    final = load_file(run / "final" / "model.safetensors")
    assert said["weights"] == pytest.approx(
        float(sum(value.double().sum() for value in final.values())), rel=1e-12
    )


def test_the_command_line_works_on_the_run_of_a_script(trained: Any) -> None:
    run, _, _ = trained
    content = launcher.status(run)
    assert (content["state"], content["step"], content["exit_code"]) == ("finished", 6, 0)
    assert content["placement"] == "mirror"
    assert launcher.processes_of(run) == []


def test_a_script_s_run_resumes_from_its_directory_on_one_worker(trained: Any) -> None:
    run, said, _ = trained
    result = launcher.run(
        "resume", run, "--workers", 1, "--steps", 8,
        "--set", "pipeline.placement=line", "--set", "pipeline.boundaries=null",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    losses = launcher.losses(run)
    assert list(losses) == list(range(1, 9))
    assert [losses[step] for step in range(1, 7)] == said["losses"]
