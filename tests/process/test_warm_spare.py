"""A spare has everything ready that does not depend on the rank: its first step finds it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SPARE = """
import gc, json, sys
from pathlib import Path

import torch

from deepopt.convert import build_layers
from deepopt.job_file import load_job
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.weight_ways import Verdict, Way
from deepopt.planner.decide import make_plan
from deepopt.worker.stage_worker import PipelineStep, StageWorker

job = load_job(None, [
    "model.kwargs={num_blocks: 1, d_model: 16, expert_hidden: 16}",
    "training.microbatches=2",
    "training.microbatch_size=1",
    "pipeline.schedule=zb_h1",
])
warmth = StageWorker.warm(job, Path(sys.argv[1]))
frozen = gc.get_freeze_count()
plan = make_plan(job, warmth.skeleton, num_workers=1, plan_id=1).plan
before = set(sys.modules)
names = dict(enumerate(plan.layer_names))
layers, loss = build_layers(job, list(names), device=torch.device("cpu"))
step = PipelineStep(
    job=job,
    plan=plan,
    skeleton=warmth.skeleton,
    rank=0,
    layers=dict(zip(names, layers, strict=True)),
    loss=loss,
    transport=LoneTransport(),
    batches=warmth.batches,
    device=torch.device("cpu"),
    known_ways=dict.fromkeys(names.values(), Verdict(way=Way.DEFERRED)),
)
step.run(1)
print(json.dumps({"frozen": frozen, "imported": sorted(set(sys.modules) - before)}))
"""


def test_the_first_step_of_a_warm_process_imports_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SPARE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["imported"] == []
    assert (
        found["frozen"] > 10_000
    )  # torch and what it imports: no collection looks at them again
