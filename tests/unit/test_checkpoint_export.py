"""Final weights: original names, the model's dtypes, tied weights, files of bounded size."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from deepopt.checkpoint.export import INDEX_NAME, export_weights
from deepopt.checkpoint.store import CheckpointStore
from deepopt.errors import CheckpointError
from support.checkpoints import bits, commit_step, make_skeleton, make_states, write_step


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 3))
        self.out = torch.nn.Linear(3, 7, bias=False)
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))


class Model(torch.nn.Module):
    """The model of `make_skeleton`, as its user wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)
        self.blocks = torch.nn.ModuleList([Block()])
        self.blocks[0].out.weight = self.embedding.weight


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return commit_step(CheckpointStore(tmp_path / "checkpoints"), 50)


def wanted() -> dict[str, torch.Tensor]:
    embedding, block = (state.tensors for state in make_states(50))
    return {
        "embedding.weight": embedding["parameter/embedding.weight"],
        "blocks.0.weight": block["parameter/blocks.0.weight"],
        "blocks.0.out.weight": embedding["parameter/embedding.weight"],
        "blocks.0.bias": block["parameter/blocks.0.bias"].bfloat16(),
        "blocks.0.counts": block["buffer/blocks.0.counts"],
    }


def assert_same_weights(found: dict[str, torch.Tensor]) -> None:
    assert {name: (tensor.dtype, bits(tensor)) for name, tensor in found.items()} == {
        name: (tensor.dtype, bits(tensor)) for name, tensor in wanted().items()
    }


def test_a_plain_model_loads_the_weights_strictly(checkpoint: Path, tmp_path: Path):
    (file,) = export_weights(checkpoint, make_skeleton(), tmp_path / "final")
    assert file == tmp_path / "final" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    assert_same_weights(weights)
    model = Model()
    model.load_state_dict(weights, strict=True)
    assert bits(model.state_dict()["blocks.0.weight"]) == bits(weights["blocks.0.weight"])
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(170, 2), (124, 3), (1, 5)])
def test_large_weights_are_cut_into_files_with_an_index(
    checkpoint: Path, tmp_path: Path, max_shard_bytes: int, num_files: int
):
    files = export_weights(
        checkpoint, make_skeleton(), tmp_path / "final", max_shard_bytes=max_shard_bytes
    )
    assert [path.name for path in files] == [
        *(
            f"model-{index:05d}-of-{num_files:05d}.safetensors"
            for index in range(1, num_files + 1)
        ),
        INDEX_NAME,
    ]
    index = json.loads(files[-1].read_text())
    found = {}
    for path in files[:-1]:
        held = safetensors.torch.load_file(path)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_shard_bytes
        assert {index["weight_map"][name] for name in held} == {path.name}
        found |= held
    assert_same_weights(found)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert index["weight_map"].keys() == found.keys()


def test_a_new_export_replaces_the_old_one_whole(checkpoint: Path, tmp_path: Path):
    final = tmp_path / "final"
    export_weights(checkpoint, make_skeleton(), final, max_shard_bytes=1)
    for leftover in ("final.tmp", "final.old"):
        (tmp_path / leftover).mkdir()
    export_weights(checkpoint, make_skeleton(), final)
    assert [path.name for path in final.iterdir()] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "final"]


def test_a_folder_with_other_files_is_not_replaced(checkpoint: Path, tmp_path: Path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"no earlier export: \['thesis.tex'\]"):
        export_weights(checkpoint, make_skeleton(), tmp_path / "final")
    assert (tmp_path / "final" / "thesis.tex").exists()


def test_a_disk_that_fills_up_leaves_the_earlier_export(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    final = tmp_path / "final"
    export_weights(checkpoint, make_skeleton(), final)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(CheckpointError, match=r"model.safetensors.*ENOSPC"):
        export_weights(checkpoint, make_skeleton(), final)
    monkeypatch.undo()
    assert_same_weights(safetensors.torch.load_file(final / "model.safetensors"))


def test_another_model_and_a_missing_tensor_are_named(tmp_path: Path):
    store = CheckpointStore(tmp_path / "checkpoints")
    skeleton = make_skeleton()
    embedding, block = skeleton.layers
    other = replace(skeleton, layers=(embedding, replace(block, name="blocks.1")))
    with pytest.raises(CheckpointError, match="is of another model"):
        export_weights(commit_step(store, 50), other, tmp_path / "final")
    more = replace(skeleton, layers=(embedding, replace(block, buffers=("blocks.0.bias_E",))))
    with pytest.raises(CheckpointError, match=r"holds no buffer/blocks.0.bias_E"):
        export_weights(store.checkpoints()[0], more, tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_a_damaged_checkpoint_is_not_exported(checkpoint: Path, tmp_path: Path):
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_weights(checkpoint, make_skeleton(), tmp_path / "final")
    assert not (tmp_path / "final").exists()


def test_an_export_reads_only_committed_checkpoints(tmp_path: Path):
    store = CheckpointStore(tmp_path / "checkpoints")
    write_step(store, 50)
    with pytest.raises(CheckpointError, match=r"manifest.json.*ENOENT"):
        export_weights(store.begin(50, 1), make_skeleton(), tmp_path / "final")
