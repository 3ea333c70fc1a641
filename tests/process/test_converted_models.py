"""Models of other people over real workers: with dropout and ties, in mirror placement, they have the
losses of one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.checkpoint.export import export_weights
from deepopt.checkpoint.layer_files import read_manifest
from deepopt.config import JobConfig
from deepopt.convert import build_chain, describe
from support.worker_processes import commit, losses_of, make_plan, train

STEPS = 4
HF, NASTY = "support.transformers_models", "support.nasty_models"


def make_job(factory: str, dataset: str, *, data: dict[str, Any], **sections: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "data": {"dataset": dataset, "kwargs": data},
            "training": {"microbatches": 4, "microbatch_size": 2, "grad_clip": 0.5},
            "optimizer": {"warmup_steps": 2},
            "logging": {"peak_flops": 1e9},
            **sections,
            "model": {"factory": factory, **sections.get("model", {})},
        }
    )


def mirror(job: JobConfig, *, ranks: int) -> Any:
    num_layers = len(describe(job).layers)
    return make_plan(
        job,
        placement="mirror",
        schedule="bi_stream",
        boundaries=tuple(num_layers * rank // ranks for rank in range(ranks)),
        pipeline_size=ranks,
    )


@pytest.mark.parametrize(
    ("job", "ranks"),
    [
        pytest.param(
            make_job(
                f"{HF}:gpt2",
                f"{HF}:Batches",
                data={"kind": "labels"},
                model={"kwargs": {"dropout": 0.1}},
            ),
            4,
            id="gpt2-tied-dropout",
        ),
        pytest.param(
            make_job(
                f"{HF}:t5",
                f"{HF}:Batches",
                data={"kind": "pairs"},
                model={"kwargs": {"dropout": 0.1}},
                pipeline={"recompute": "full"},
            ),
            4,
            id="t5-dropout-recomputed",
        ),
        pytest.param(
            make_job(f"{HF}:mixtral", f"{HF}:Batches", data={"kind": "padded"}), 3, id="mixtral"
        ),
        pytest.param(
            make_job(
                f"{HF}:transformer",
                f"{HF}:Batches",
                data={"kind": "features"},
                model={"loss": f"{HF}:mean_square"},
            ),
            4,
            id="nn.Transformer",
        ),
        pytest.param(
            make_job(f"{HF}:qwen3_moe", f"{HF}:Batches", data={"kind": "labels"}),
            4,
            id="qwen3-moe",
        ),
        pytest.param(
            make_job(f"{HF}:bert", f"{HF}:Batches", data={"kind": "padded late"}),
            2,
            id="bert-some-padded",
        ),
        pytest.param(
            make_job(f"{HF}:vit", f"{HF}:Batches", data={"kind": "images"}), 2, id="vit"
        ),
        pytest.param(
            make_job(f"{NASTY}:Recurrent", f"{NASTY}:Batches", data={}), 2, id="shared-block"
        ),
        pytest.param(
            make_job(
                f"{HF}:llama",
                f"{HF}:Batches",
                data={"kind": "ids"},
                precision={"dtype": "bfloat16"},
            ),
            2,
            id="llama-bf16",
        ),
    ],
)
def test_mirror_has_the_losses_of_one_worker(
    job: JobConfig, ranks: int, tmp_path: Path
) -> None:
    alone = losses_of(job, make_plan(job), run_dir=tmp_path / "alone", last_step=STEPS)
    cut = losses_of(job, mirror(job, ranks=ranks), run_dir=tmp_path / "cut", last_step=STEPS)
    assert cut == alone
    assert len(set(alone)) == STEPS


@pytest.mark.parametrize(
    ("factory", "dataset", "data", "dtype"),
    [
        pytest.param(
            f"{HF}:llama_adapted",
            f"{HF}:Batches",
            {"kind": "labels"},
            "bfloat16",
            id="adapters",
        ),
        pytest.param(
            f"{NASTY}:FrozenFront", f"{NASTY}:Batches", {}, "float32", id="whole-stage"
        ),
    ],
)
def test_frozen_parameters_keep_their_bits_through_training_checkpoint_and_export(
    factory: str, dataset: str, data: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    job = make_job(factory, dataset, data=data, precision={"dtype": dtype})
    skeleton = describe(job)
    parameters = [p for layer in skeleton.layers for p in layer.parameters]
    frozen = {p.name for p in parameters if not p.requires_grad}
    trained = {p.name for p in parameters if p.requires_grad}
    plan = mirror(job, ranks=2)
    outcome = train(job, plan, run_dir=tmp_path / "cut", last_step=3)
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path / "cut")
    alone = losses_of(job, make_plan(job), run_dir=tmp_path / "alone", last_step=3)
    assert outcome.losses == alone

    manifest = read_manifest(checkpoint)
    keys = {key for shard in manifest.shards for key in shard.tensors}
    assert {key.split("/")[1] for key in keys if key.startswith("optimizer/")} == trained
    torch.manual_seed(job.training.seed)
    original = build_chain(job, device="cpu").model.state_dict()
    (file,) = export_weights(checkpoint, skeleton, tmp_path / "final")
    found = load_file(file)
    assert {name for name in frozen if not torch.equal(found[name], original[name])} == set()
    assert {name for name in trained if torch.equal(found[name], original[name])} == set()


@pytest.mark.parametrize(
    ("factory", "dataset", "data"),
    [
        pytest.param(f"{HF}:t5", f"{HF}:Batches", {"kind": "pairs"}, id="t5"),
        pytest.param(f"{NASTY}:Recurrent", f"{NASTY}:Batches", {}, id="shared-block"),
        pytest.param(f"{NASTY}:Counting", f"{NASTY}:Batches", {}, id="buffers"),
    ],
)
def test_exported_weights_load_into_the_original(
    factory: str, dataset: str, data: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    job = make_job(factory, dataset, data=data)
    num_layers = len(describe(job).layers)
    plan = make_plan(job, boundaries=(0, num_layers // 2), pipeline_size=2)
    outcome = train(job, plan, run_dir=tmp_path, last_step=2)
    checkpoint = commit(outcome, job, plan, run_dir=tmp_path)
    (file,) = export_weights(checkpoint, describe(job), tmp_path / "final")
    model = build_chain(job, device="cpu").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(load_file(file), strict=True)
    moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert len(moved) > len(before) // 2
    if "calls" in before:
        assert model.calls == 2 * job.training.microbatches
