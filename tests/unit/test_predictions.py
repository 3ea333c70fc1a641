"""Outputs in files: every structure comes back whole and in order; what fills a batch up is gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from deepopt.datasets.epochs import EpochSource
from deepopt.errors import InputError, RunDirectoryError, TrainingError
from deepopt.pipeline.evaluation import weighted_mean
from deepopt.trainer.data import Reading, read_evaluation, read_prediction
from deepopt.worker.predictions import OutputWriter, generation_folder, read_predictions

SIZE, SAMPLES = 2, 7
DATA = torch.arange(float(SAMPLES)).unsqueeze(1)


@dataclass
class Answer:
    logits: torch.Tensor
    loss: torch.Tensor | None
    layers: tuple[torch.Tensor, ...]


def answer(rows: torch.Tensor) -> Any:
    return Answer(logits=rows, loss=rows.mean(), layers=(rows * 2, torch.zeros(5)))


def write(root: Path, make: Any, *, numbers: range, rank: int = 0, generation: int = 1) -> None:
    writer = OutputWriter(
        generation_folder(root, generation),
        rank=rank,
        size=SIZE,
        samples=lambda number: min(SIZE, SAMPLES - number * SIZE),
        part_bytes=8,
    )
    for number in numbers:
        rows = [min(i, SAMPLES - 1) for i in range(number * SIZE, (number + 1) * SIZE)]
        writer.take(number, make(DATA[rows]))
    writer.flush()


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        lambda rows: (rows, {"twice": rows * 2}),
        answer,
        lambda rows: {"logits": rows.bfloat16(), "count": 3},
    ],
    ids=["tensor", "tuple", "dataclass", "dict"],
)
def test_every_structure_comes_back(make: Any, tmp_path: Path) -> None:
    write(tmp_path, lambda rows: rows + 9, numbers=range(3), generation=1)  # broke off
    write(tmp_path, make, numbers=range(2, 4), rank=1, generation=10)
    write(tmp_path, make, numbers=range(2), rank=0, generation=10)
    found, expected = read_predictions(tmp_path, num_microbatches=4), make(DATA)
    assert type(found) is type(expected)
    if isinstance(expected, Answer):
        assert torch.equal(found.logits, DATA)
        assert found.loss is None
        assert torch.equal(found.layers[0], DATA * 2)
        assert found.layers[1] is None
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_missing_outputs_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, answer, numbers=range(3))
    with pytest.raises(RunDirectoryError, match="lacks the outputs of 1 of 4 micro-batches"):
        read_predictions(tmp_path, num_microbatches=4)


def test_an_output_of_no_samples_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no tensor whose first dimension is the 2"):
        write(tmp_path, lambda rows: rows.mean(), numbers=range(1))


def test_weights_that_are_equal_change_no_bit() -> None:
    values = torch.rand(7).tolist()
    assert weighted_mean(values, [3] * 7) == weighted_mean(values, [1] * 7)
    assert weighted_mean([1.0, 4.0], [2, 1]) == 2.0


class Bare(Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return DATA[index]


@pytest.mark.parametrize(
    "dataset",
    [
        Bare(),
        TensorDataset(DATA),
        TensorDataset(DATA, DATA),
        DataLoader(Bare(), batch_size=4),
        [DATA[:4], DATA[4:]],
        [(DATA[:4], DATA[:4]), (DATA[4:], DATA[4:])],
    ],
    ids=["bare", "one-tensor", "pairs", "loader", "batches", "batches-of-pairs"],
)
def test_all_samples_are_read_in_order_with_and_without_targets(dataset: Any) -> None:
    is_batches = isinstance(dataset, DataLoader | list)
    reading = Reading(batch_size=None if is_batches else 4, microbatches=2, drop_last=True)
    data = read_prediction(dataset, model=torch.nn.Linear(1, 1), reading=reading)
    assert isinstance(data.source, EpochSource)
    assert data.source.num_samples == SAMPLES
    rows = [data.source.batch(1 + n // 2, n % 2)[0] for n in range(4)]
    assert all(isinstance(row, torch.Tensor) and len(row) == SIZE for row in rows)
    assert torch.equal(torch.cat(rows)[:SAMPLES], DATA)  # type: ignore[arg-type]


def test_what_is_asked_for_must_have_an_order_and_for_a_loss_targets() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="draws its samples at random"):
        read_prediction(DataLoader(Bare(), shuffle=True), model=model, reading=Reading())
    source = read_evaluation(Bare(), model=model, reading=Reading()).source
    with pytest.raises(InputError, match="has no targets"):
        source.batch(1, 0)
