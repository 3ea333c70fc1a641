"""What a script gets wrong is one clear error with a next step, before any process is started."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from deepopt import DeepTrainer
from deepopt.errors import InputError
from support.nasty_models import BranchingOnLayers

HERE = r"test_trainer_rehearsal\.py:\d+"


class Rows(Dataset[Any]):
    def __init__(self, length: int = 16, width: int = 6) -> None:
        self.length = length
        self.width = width

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(self.width), torch.zeros(3)


class Raising(Rows):
    def __getitem__(self, index: int) -> Any:
        raise KeyError("no such row")


class Generating(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.rows = (row for row in range(3))


class Stream(IterableDataset[Any]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return (Rows()[index] for index in range(self.length))


class Counting(torch.nn.Module):
    """Reads a value, which the meta device has not; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.linear(x) * (2.0 if x.sum().item() > 0 else 1.0)


class Failing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


def drops_biases(pairs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for name, p in pairs if "bias" not in name], lr=0.1)


def one_short(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters()][:-1], lr=0.1)


def one_more(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(2))], lr=0.1)


def trainer(folder: Path, model: torch.nn.Module, **arguments: Any) -> DeepTrainer:
    given = {"loss_fn": mean_square, "batch_size": 8, "workers": 1, "progress": False}
    return DeepTrainer(model, run_dir=folder / "run", **{**given, **arguments})


def refused(folder: Path, model: torch.nn.Module, dataset: Any, **arguments: Any) -> InputError:
    fit = {"max_steps": 2} if isinstance(dataset, IterableDataset) else {}
    with pytest.raises(InputError) as caught:
        trainer(folder, model, **arguments).fit(dataset, **fit)
    assert caught.value.remedy
    assert not (folder / "run").exists()
    return caught.value


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        pytest.param(
            BranchingOnLayers, Rows(), r"nasty_models\.py:\d+: .* known only in training", id="branch"
        ),
        pytest.param(
            Failing, Rows(width=5), rf"Failing raised .*shapes.* \(.*{HERE}\)", id="shape, recorded"
        ),
        pytest.param(
            make_model, Rows(width=5), "Sequential raised RuntimeError: .*shapes", id="shape, named"
        ),
        pytest.param(make_model, Rows(19), "19 samples do not divide into batches of 8", id="last"),
        pytest.param(make_model, Stream(5), "ended in step 1: 5 of 8 samples are left", id="ends"),
        pytest.param(make_model, Rows(0), "dataset is empty", id="empty"),
        pytest.param(make_model, Stream(0), r"\(Stream\) gave nothing", id="empty stream"),
        pytest.param(make_model, Generating(), r"the dataset\.rows cannot be carried", id="pickle"),
        pytest.param(make_model, Raising(), f"KeyError: 'no such row' .*{HERE}", id="raises"),
    ],
)  # fmt: skip
def test_a_model_and_data_that_do_not_fit(
    model: Callable[[], torch.nn.Module], dataset: Any, message: str, tmp_path: Path
) -> None:
    error = refused(tmp_path, model(), dataset)
    assert re.search(message, error.message)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "message"),
    [
        (drops_biases, {}, "does not know parameter 0.bias"),
        (one_short, {}, "does not know parameter 1.bias"),
        (one_more, {}, "1 parameter(s) of the SGD are none of the model's"),
        (torch.optim.SGD, {"optimizer_kwargs": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        (torch.optim.LBFGS, {}, "LBFGS cannot train a pipeline"),
        (
            torch.optim.SGD,
            {"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
            "ReduceLROnPlateau waits for a metric",
        ),
    ],
)  # fmt: skip
def test_an_optimizer_that_does_not_fit(
    optimizer: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make_model()
    if optimizer in (one_short, one_more):
        optimizer = optimizer(model)
    error = refused(tmp_path, model, Rows(), optimizer=optimizer, **arguments)
    assert message in error.message


def test_a_loader_with_a_shorter_last_batch(tmp_path: Path) -> None:
    loader = DataLoader(Rows(19), batch_size=4)
    error = refused(tmp_path, make_model(), loader, batch_size=None)
    assert error.message == "the last batch has 3 samples, the others have 4"


def test_a_model_that_needs_values_is_asked_with_values_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Started(Exception):
        pass

    def start(*_: Any, **__: Any) -> None:
        raise Started

    monkeypatch.setattr("deepopt.trainer.run.follow", start)
    model = torch.nn.Sequential(Counting(), torch.nn.Linear(3, 3)).train()
    with pytest.raises(Started):
        trainer(tmp_path, model).fit(Rows())
    assert model[0].calls == 0
    assert model.training
    again = torch.nn.Sequential(Counting(), torch.nn.Linear(4, 3))
    error = refused(tmp_path / "again", again, Rows())
    assert "Sequential raised RuntimeError" in error.message
