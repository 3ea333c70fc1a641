"""Adapters of peft, as a script puts them on a model: they alone are trained, and become what peft loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from deepopt.checkpoint.layer_files import read_manifest
from deepopt.checkpoint.verification import Found
from deepopt.config import JobConfig
from deepopt.convert import convert_to_deepopt, describe
from deepopt.job_file import dump_job
from deepopt.launch.export_run import export_run
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import write_json_atomic
from deepopt.trainer import DeepTrainer
from deepopt.trainer.checkpoints import load_weights
from support import transformers_models as hf
from support.trainer_jobs import make_trainer_job
from support.worker_processes import commit, losses_of, make_plan, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers
)
STEPS = 3


class Tokens(Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, hf.VOCABULARY, (12,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def adapted() -> Any:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(hf.llama(), config)
    model.enable_input_require_grads()
    model.base_model.model.activation_checkpointing_enable()
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, JobConfig, Path, Path]:
    """The model before and after, its job, run directory and checkpoint."""
    folder = tmp_path_factory.mktemp("adapters")
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    job = make_trainer_job(
        model, Tokens(), folder, steps=STEPS, microbatches=4, optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 0.01},
    )  # fmt: skip
    count = len(describe(job).layers)
    plan = make_plan(
        job, placement="mirror", schedule="bi_stream", pipeline_size=2, boundaries=(0, count // 2)
    )  # fmt: skip
    outcome = train(job, plan, run_dir=folder, last_step=STEPS)
    assert not outcome.failures, outcome.failures
    alone = losses_of(job, make_plan(job), run_dir=folder / "alone", last_step=STEPS)
    assert outcome.losses == alone
    checkpoint = commit(outcome, job, plan, run_dir=folder)
    return model, before, job, folder, checkpoint


def test_adapters_alone_are_trained_and_names_stay(trained: Any) -> None:
    model, before, _, _, checkpoint = trained
    manifest = read_manifest(checkpoint)
    load_weights(model, Found(path=checkpoint, manifest=manifest, rejected=()))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 17, "two matrices in two places of four layers, and the head"
    state = model.state_dict()
    assert list(state) == list(before)
    assert {name for name in state if not torch.equal(state[name], before[name])} == trainable
    keys = {key for shard in manifest.shards for key in shard.tensors}
    assert {key.split("/")[1] for key in keys if key.startswith("optimizer/")} == trainable
    ids = Tokens()[0]["input_ids"].unsqueeze(0)
    converted = convert_to_deepopt(model, example_inputs={"input_ids": ids})
    assert list(converted.state_dict()) == list(before)


@pytest.mark.parametrize("way", ["trainer", "run"])
def test_exported_adapters_are_what_peft_loads(trained: Any, tmp_path: Path, way: str) -> None:
    import peft

    model, _, job, folder, checkpoint = trained
    load_weights(model, Found(path=checkpoint, manifest=read_manifest(checkpoint), rejected=()))
    target = tmp_path / "adapter"
    if way == "trainer":
        DeepTrainer(model).export(target)
    else:
        run = RunDirectory(folder)
        run.job.write_text(dump_job(job))
        write_json_atomic(run.model, describe(job).to_json())
        files = export_run(run, target, kind="hf")
        assert [file.name for file in files] == [
            "adapter_model.safetensors",
            "adapter_config.json",
        ]
    torch.manual_seed(3)
    loaded = peft.PeftModel.from_pretrained(hf.llama(), target)
    ids = Tokens()[0]["input_ids"].unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, copy.deepcopy(model).eval()(ids).logits)
