"""`deepopt export`: the folder that a run's weights make is what transformers loads and would have saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.store import CheckpointStore
from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.errors import CheckpointError, InputError
from deepopt.job_file import dump_job
from deepopt.launch.export_run import export_run
from deepopt.pipeline.optimizer import AdamWOptimizer
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import write_json_atomic
from deepopt_cli.app import app
from support import transformers_models
from support.checkpoints import make_manifest

FACTORY = "deepopt.models.hugging_face:build"
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def make_run(folder: Path, *, factory: str = FACTORY, **kwargs: Any) -> RunDirectory:
    """A run directory as a job leaves it, at step 7, its weights moved by one."""
    assert transformers_models.VOCABULARY  # its import keeps transformers off the network
    job = JobConfig.model_validate(
        {"model": {"factory": factory, "kwargs": kwargs}, "data": {"sequence_length": 8}}
    )
    run = RunDirectory(folder)
    folder.mkdir()
    run.job.write_text(dump_job(job))
    skeleton = describe(job)
    write_json_atomic(run.model, skeleton.to_json())
    layers, _ = build_layers(job, range(len(skeleton.layers)), device=torch.device("cpu"))
    states = []
    for layer in layers:
        with torch.no_grad():
            for parameter in layer.parameters.values():
                parameter.add_(1.0)
        tensors = {
            key: value
            for key, value in AdamWOptimizer(layer, job.optimizer).export_state().items()
            if key.split("/")[1] not in layer.tied
        }
        states.append(LayerState(layer=layer.name, tensors=tensors))
    store = CheckpointStore(run.checkpoints)
    store.begin(7, 1)
    shards = [store.write_layer(7, 1, state, 0) for state in states]
    manifest = make_manifest(7, shards=shards)
    names = [layer.name for layer in layers]
    store.commit(
        replace(
            manifest,
            skeleton_fingerprint=skeleton.fingerprint(),
            plan={"plan_id": 1, "layer_names": names},
        )
    )
    return run


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2-tied", "llama"])
def test_from_pretrained_loads_the_folder_with_the_weights_of_the_checkpoint(
    config: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    run = make_run(tmp_path / "run", config=config)
    export_run(run, tmp_path / "out", kind="hf")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    torch.manual_seed(0)
    from deepopt.models.hugging_face import build

    for (name, found), value in zip(
        loaded.named_parameters(), build(config=config).parameters(), strict=True
    ):
        assert torch.equal(found, value + 1.0), name
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied is (config is GPT2)
    loaded.save_pretrained(tmp_path / "again")
    from safetensors import safe_open

    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as theirs,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads((tmp_path / "again" / "config.json").read_text())


def test_large_models_become_several_files_with_an_index_and_replace_the_last_export(
    tmp_path: Path,
) -> None:
    import transformers

    run = make_run(tmp_path / "run", config=LLAMA)
    export_run(run, tmp_path / "out", kind="hf")
    told: list[tuple[str, float]] = []
    files = export_run(
        run,
        tmp_path / "out",
        kind="hf",
        max_shard_bytes=4000,
        tell=lambda what, share: told.append((what, share)),
    )
    assert told[0] == ("verifying the checkpoint", 0.0)
    shares = [share for _, share in told[1:]]
    assert shares == sorted(set(shares))
    assert 0.5 < shares[-1] < 1.0
    names = {path.name for path in files}
    assert "model.safetensors.index.json" in names
    assert "model.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}
    assert sum(name.startswith("model-0") for name in names) > 2
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_model_of_ones_own_is_exported_as_weights_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", factory="support.models:sequential")
    with pytest.raises(InputError, match="made a Sequential, which is no model of transform"):
        export_run(run, tmp_path / "out", kind="hf")
    assert not (tmp_path / "out").exists()
    (file,) = export_run(run, tmp_path / "out", kind="weights")
    assert file.name == "model.safetensors"


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", factory="support.models:sequential")
    with pytest.raises(CheckpointError, match="no checkpoint of step 8") as refused:
        export_run(run, tmp_path / "out", kind="weights", step=8)
    assert refused.value.remedy == "it holds 7"
    assert export_run(run, tmp_path / "out", kind="weights", step=7)


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", factory="support.models:sequential")
    arguments = ["export", str(run.root), "--to", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--format", "weights", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["files"] == ["model.safetensors"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "--format weights" in refused.stderr
