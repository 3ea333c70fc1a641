"""Checkpoints are found by any path, copied whole, and read into the user's own model or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepopt.checkpoint.store import CheckpointStore
from deepopt.errors import CheckpointError
from deepopt.trainer.checkpoints import copy_checkpoint, find_checkpoint, load_weights
from support.checkpoints import commit_step, make_states


class Model(torch.nn.Module):
    """The model that `support.checkpoints` describes."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, width)
        block = torch.nn.Linear(3, 3)
        block.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        block.out = torch.nn.Linear(width, 7, bias=False)
        block.out.weight = self.embedding.weight
        self.blocks = torch.nn.ModuleList([block])


def test_the_newest_whole_checkpoint_is_found_copied_and_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    commit_step(store, 3)
    newest = commit_step(store, 6)
    found = find_checkpoint(tmp_path / "checkpoints")
    assert (found.path, found.manifest.step) == (newest, 6)
    copy_checkpoint(found, tmp_path / "kept")
    model = Model()
    load_weights(model, find_checkpoint(tmp_path / "kept" / newest.name))
    for state in make_states(6):
        for key, value in state.tensors.items():
            kind, _, name = key.partition("/")
            if kind == "parameter":
                assert torch.equal(model.get_parameter(name), value), key
            elif kind == "buffer":
                assert torch.equal(model.get_buffer(name), value), key
    with pytest.raises(CheckpointError, match="is there already"):
        copy_checkpoint(found, tmp_path / "kept")


def test_a_linked_copy_takes_no_room_and_outlives_the_original(tmp_path: Path) -> None:
    newest = commit_step(CheckpointStore(tmp_path / "checkpoints"), 3)
    files = [path for path in newest.rglob("*") if path.is_file()]
    copy = copy_checkpoint(find_checkpoint(newest), tmp_path / "job", linked=True)
    for path in files:
        assert path.samefile(copy / path.relative_to(newest))
        path.unlink()
    assert find_checkpoint(copy).manifest.step == 3


def test_another_model_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    found = find_checkpoint(commit_step(CheckpointStore(tmp_path), 1))
    wide = Model(width=4)
    before = wide.embedding.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"embedding\.weight has shape \[7, 3\] there and \[7, 4\] here"
    ):
        load_weights(wide, found)
    assert torch.equal(wide.embedding.weight, before)
    more = Model()
    more.extra = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"it lacks extra\.weight"):
        load_weights(more, found)
    with pytest.raises(CheckpointError, match="it holds parameter/"):
        load_weights(torch.nn.Linear(1, 1), found)


def test_a_place_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_checkpoint(tmp_path / "gone")
