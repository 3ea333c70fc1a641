"""`DeepTrainer` as docs/trainer.md shows it: real workers, the run directory of a launched job, weights back
in the model, and going on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import launcher

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

DOCS = Path(__file__).parents[2] / "docs" / "trainer.md"

# The documented script, of a smaller width; then it goes on with another trainer and a new model.
GOES_ON = """
import json
weights = float(sum(p.double().sum() for p in model.parameters()))
first = {"state": result.state, "step": result.step, "losses": result.losses, "weights": weights}

other = torch.nn.Transformer(48, 12, 4, 4, batch_first=True)
epochs = []
class Seen(Callback):
    def on_epoch(self, trainer, epoch):
        epochs.append(epoch)
again = DeepTrainer(
    other, workers=1, placement="line", loss_fn=mean_square, batch_size=16, optimizer=torch.optim.AdamW,
    optimizer_kwargs={"lr": 1e-3}, callbacks=[Seen()], progress=False,
)
more = again.fit(Reversed(), epochs=3, resume_from=result.run_dir)
again.save("saved")
loaded = DeepTrainer(model).load("saved")
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
print(json.dumps({
    "first": first, "run": str(result.run_dir), "more": more.losses, "epochs": epochs,
    "loaded": loaded, "same": same,
}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The script's run directory, what it said, and its stderr."""
    folder = tmp_path_factory.mktemp("trainer")
    match = re.search(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert match is not None
    example = (
        match[1].replace("768", "48").replace("DeepTrainer\n", "Callback, DeepTrainer\n", 1)
    )
    (folder / "train.py").write_text(example + GOES_ON)
    result = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=launcher.TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    return Path(said["run"]), said, result.stderr


def test_fit_trains_and_shows_its_progress(trained: Any) -> None:
    run, said, stderr = trained
    first = said["first"]
    assert (first["state"], first["step"]) == ("finished", 8)
    assert first["losses"] == list(launcher.losses(run).values())[:8]
    assert first["losses"][-1] < first["losses"][0]
    assert "step 1/8  loss " in stderr


def test_a_run_goes_on_with_another_trainer_on_one_worker(trained: Any) -> None:
    run, said, _ = trained
    assert list(launcher.losses(run)) == list(range(1, 13))
    assert said["more"] == list(launcher.losses(run).values())[8:]
    assert said["epochs"] == [3]
    assert (said["loaded"], said["same"]) == (12, True)


def test_the_command_line_works_on_the_run_of_a_script(trained: Any) -> None:
    from safetensors.torch import load_file

    run, _, _ = trained
    content = launcher.status(run)
    assert (content["state"], content["step"], content["exit_code"]) == ("finished", 12, 0)
    assert launcher.processes_of(run) == []
    result = launcher.run("resume", run, "--workers", 2, "--steps", 13)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list(launcher.losses(run)) == list(range(1, 14))
    assert len(load_file(run / "final" / "model.safetensors")) > 100
