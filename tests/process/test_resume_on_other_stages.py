"""What one placement wrote, any other goes on from, with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.checkpoint.export import export_weights
from deepopt.convert import build_chain, describe
from deepopt.errors import CheckpointError
from support.worker_processes import commit, losses_of, make_plan, tiny_job, train

MIRROR: dict[str, Any] = {
    "placement": "mirror",
    "schedule": "bi_stream",
    "boundaries": (0, 3, 6),
    "pipeline_size": 3,
}
UNEVEN: dict[str, Any] = {"boundaries": (0, 6), "pipeline_size": 2}
STEPS, HALF = 6, 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_cut_in_two_on_other_stages_has_the_losses_of_one_run(
    dtype: str, tmp_path: Path
) -> None:
    job = tiny_job(precision={"dtype": dtype})
    unbroken = losses_of(job, make_plan(job), run_dir=tmp_path / "one", last_step=STEPS)

    first_plan = make_plan(job, **MIRROR)
    first = train(job, first_plan, run_dir=tmp_path / "two", last_step=HALF)
    checkpoint = commit(first, job, first_plan, run_dir=tmp_path / "two")
    second = train(
        job,
        make_plan(job, **UNEVEN),
        run_dir=tmp_path / "two",
        start_step=HALF,
        last_step=STEPS,
        checkpoint=checkpoint,
        generation=2,
    )
    assert [r.step for r in second.reports] == [4, 5, 6]
    assert first.losses + second.losses == unbroken


def test_every_layer_is_written_once_and_tied_weights_where_they_are_first_used(
    tmp_path: Path,
) -> None:
    job = tiny_job()
    plan = make_plan(job, **MIRROR)
    outcome = train(job, plan, run_dir=tmp_path, last_step=1)
    shards = [shard for written in outcome.shards for shard in written.shards]
    assert sorted(s.layer for s in shards) == sorted(plan.layer_names)
    assert len({s.writer for s in shards}) > 1, "copies share the writing"
    (head,) = (s for s in shards if s.layer == "head")
    assert not any("head.weight" in key for key in head.tensors)


def test_exported_weights_load_into_the_original_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    job = tiny_job()
    plan = make_plan(job, **UNEVEN)
    outcome = train(job, plan, run_dir=tmp_path, last_step=2)
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path)
    (file,) = export_weights(checkpoint, describe(job), tmp_path / "final")
    model = build_chain(job, device="cpu").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(load_file(file), strict=True)
    moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert len(moved) > len(before) // 2


def test_a_damaged_shard_is_refused_by_the_worker_that_loads_it(tmp_path: Path) -> None:
    job = tiny_job()
    plan = make_plan(job, **UNEVEN)
    outcome = train(job, plan, run_dir=tmp_path, last_step=1)
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path)
    shard = next(s for w in outcome.shards for s in w.shards if s.layer == "blocks.1")
    file = checkpoint / shard.file
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    again = train(job, plan, run_dir=tmp_path, start_step=1, last_step=2, checkpoint=checkpoint)
    (culprit,) = (f for f in again.failures.values() if f.kind != "peer")
    assert culprit.kind == "setup"
    assert culprit.exit_code == CheckpointError.exit_code
    assert "blocks.1" in culprit.message


def test_the_learning_rate_goes_on_where_it_was(tmp_path: Path) -> None:
    job = tiny_job()
    job = job.model_copy(
        update={"optimizer": job.optimizer.model_copy(update={"warmup_steps": 5})}
    )
    plan = make_plan(job)
    first = train(job, plan, run_dir=tmp_path, last_step=2)
    checkpoint = commit(first, job, plan, run_dir=tmp_path)
    second = train(
        job, plan, run_dir=tmp_path, start_step=2, last_step=4, checkpoint=checkpoint
    )
    peak = job.optimizer.learning_rate
    rates = [report.learning_rate / peak for report in first.reports + second.reports]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8])
