"""What a script brings along comes out of its files as it was, or is refused in words."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt import carried
from deepopt.carried.model_file import dump_model
from deepopt.carried.object_file import dump_object
from deepopt.errors import InputError


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("angles", torch.rand(1, 5).expand(3, 5), persistent=False)


def test_a_model_comes_back_with_values_ties_and_buffers(tmp_path: Path) -> None:
    model = Tied().to(torch.bfloat16)
    arguments = dump_model(model, tmp_path / "model.pkl")
    loaded = carried.model(**arguments)
    assert isinstance(loaded, Tied)
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.embed.weight.dtype is torch.bfloat16
    assert not loaded.frozen.requires_grad
    assert torch.equal(loaded.angles, model.angles)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        loaded.embed.weight.add_(1.0)
    assert torch.equal(carried.model(**arguments).embed.weight, model.embed.weight)


def test_on_the_meta_device_a_model_has_no_values_and_needs_none(tmp_path: Path) -> None:
    arguments = dump_model(Tied(), tmp_path / "model.pkl")
    (tmp_path / "model.pt").unlink()
    with torch.device("meta"):
        model = carried.model(**arguments)
    assert all(p.is_meta for p in model.parameters())
    assert model.head.weight is model.embed.weight
    with pytest.raises(InputError, match="cannot read the weights"):
        carried.model(**arguments)


def test_what_is_defined_in_a_function_is_carried_by_value(tmp_path: Path) -> None:
    factor = 3.0

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return factor * (output - targets).sum()

    arguments = dump_object(loss, tmp_path / "loss.pkl", what="loss_fn")
    assert carried.loss(torch.ones(2), torch.zeros(2), **arguments) == 6.0


class Data:
    def __init__(self) -> None:
        self.options = {"lock": threading.Lock()}


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"the dataset\.options\['lock'\] cannot be carried"
    ) as e:
        dump_object(Data(), tmp_path / "dataset.pkl", what="the dataset")
    assert "TypeError" in e.value.message
    model: Any = torch.nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(InputError, match=r"the model\.lock cannot be carried"):
        dump_model(model, tmp_path / "model.pkl")
    assert not list(tmp_path.iterdir())


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    first = dump_model(Tied(), tmp_path / "a.pkl")
    second = dump_model(Tied(), tmp_path / "b.pkl")
    with pytest.raises(InputError, match="its hash differs"):
        carried.model(file=first["file"], sha256=second["sha256"])
    (tmp_path / "b.pt").rename(tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds the weights of another model"):
        carried.model(**first)
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        carried.dataset(file=str(tmp_path / "gone"), sha256="")


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="weight is on the meta device"):
        dump_model(model, tmp_path / "model.pkl")
