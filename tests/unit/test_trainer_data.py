"""Whatever a user calls data becomes steps, or one clear error."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from deepopt.errors import InputError
from deepopt.trainer.data import Data, Reading, idle_readers, read_data

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 2))


class Pairs(Dataset[Any]):
    """Sample i is (i, i, i) -> i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)), torch.tensor(index)


class Stream(IterableDataset[Any]):
    """The same samples, in order; keeps its position where told to."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        return iter([Pairs(self.length)[i] for i in range(self.length)])


class Keeping(Stream):
    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.length:
            self.position += 1
            yield Pairs(self.length)[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Drawing(Pairs):
    """Each sample draws from every global generator."""

    def __getitem__(self, index: int) -> Any:
        drawn = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.full((3,), drawn), torch.tensor(drawn)


def read(dataset: Any, model: torch.nn.Module = MODEL, **reading: Any) -> Data:
    return read_data(dataset, model=model, reading=Reading(**reading))


def samples(data: Data, steps: range) -> list[int]:
    return [
        int(value)
        for step in steps
        for microbatch in range(data.layout.microbatches)
        for value in data.source.batch(step, microbatch)[1]
    ]


def batches(*sizes: int) -> list[Any]:
    return [(torch.zeros(size, 3), torch.zeros(size)) for size in sizes]


def test_each_epoch_of_a_dataset_has_each_sample_once_in_an_order_of_its_own() -> None:
    data = read(Pairs(12), batch_size=4, microbatches=2)
    assert data.steps_per_epoch == 3
    first, second = samples(data, range(1, 4)), samples(data, range(4, 7))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert samples(read(Pairs(12), batch_size=4, shuffle=False), range(1, 4)) == list(range(12))


def test_a_data_loader_keeps_its_order_its_sizes_and_its_collate() -> None:
    loader = DataLoader(Pairs(8), batch_size=4, collate_fn=lambda s: (torch.ones(len(s), 3), s))
    with pytest.raises(InputError, match="targets are a list of 1, not a tensor"):
        read(loader, microbatches=4).source.batch(1, 0)
    data = read(DataLoader(Pairs(8), batch_size=4))
    assert samples(data, range(1, 3)) == list(range(8))
    assert data.layout.microbatches == 4


def test_a_shuffling_loader_is_a_function_of_seed_and_epoch() -> None:
    generator = torch.Generator().manual_seed(5)
    sampler = RandomSampler(Pairs(8), generator=generator)
    loader = DataLoader(Pairs(8), batch_size=4, sampler=sampler)
    state = torch.get_rng_state()
    data = read(loader)
    twin = read(pickle.loads(pickle.dumps(loader)))
    order = samples(data, range(1, 5))
    assert samples(twin, range(3, 5)) == order[8:]  # another process begins in the middle
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))
    assert order[:8] != order[8:]
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_data_code_are_those_of_the_microbatch() -> None:
    data, twin = (read(Drawing(8), batch_size=4, microbatches=2) for _ in range(2))
    random.seed(1)
    before = random.getstate()
    first = data.source.batch(1, 1)
    assert random.getstate() == before
    torch.manual_seed(7)
    twin.source.batch(1, 0)
    again = twin.source.batch(1, 1)
    assert torch.equal(again[1], first[1])
    assert not torch.equal(twin.source.batch(2, 1)[1], first[1])


def test_a_list_of_batches_is_cut_into_microbatches_and_masks_are_not() -> None:
    mask = torch.ones(5, 5)
    batch = ({"src": torch.arange(8.0).view(4, 2), "mask": mask}, torch.arange(4))
    data = read([batch], microbatches=2)
    inputs, targets = data.source.batch(1, 1)
    assert isinstance(inputs, dict)
    assert inputs["src"].tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert inputs["mask"].shape == (5, 5)
    assert targets.tolist() == [2, 3]


def test_inputs_get_the_names_of_the_models_arguments() -> None:
    transformer = torch.nn.Transformer(8, 2, 1, 1, 8, batch_first=True)
    source, target = torch.zeros(2, 5, 8), torch.ones(2, 4, 8)
    for batch in (((source, target), target), (source, target, target)):
        inputs, _ = read([batch], transformer).source.batch(1, 0)
        assert isinstance(inputs, dict)
        assert list(inputs) == ["src", "tgt"]


def test_a_dict_has_its_targets_in_it() -> None:
    class Named(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return ids

    batch = {"ids": torch.zeros(2, 3), "labels": torch.ones(2), "none": None}
    inputs, targets = read([batch], Named()).source.batch(1, 0)
    assert isinstance(inputs, dict)
    assert list(inputs) == ["ids"]  # the model takes no labels
    assert targets.tolist() == [1.0]  # of one of two micro-batches


def test_a_stream_begins_anew_at_its_end() -> None:
    data = read(Stream(6), batch_size=3, microbatches=3)
    assert data.steps_per_epoch is None
    assert samples(data, range(1, 5)) == [0, 1, 2, 3, 4, 5] * 2


def test_what_a_stream_draws_is_the_same_in_every_worker() -> None:
    class Noisy(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for _ in range(8):
                yield torch.rand(3), torch.rand(())

    data, twin = (read(Noisy(), batch_size=2, microbatches=1) for _ in range(2))
    first = [data.source.batch(step, 0)[1] for step in (1, 2, 5)]
    torch.manual_seed(7)  # as a layer's dropout does
    second = [twin.source.batch(step, 0)[1] for step in (1, 2, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[2])  # another epoch


def test_a_stream_that_keeps_its_position_goes_on_where_it_was() -> None:
    data = read(Keeping(6), batch_size=2, microbatches=1)
    assert data.can_resume
    copy = pickle.loads(pickle.dumps(data.source))
    whole = samples(data, range(1, 8))
    for step in range(1, 4):
        copy.batch(step, 0)
    state = copy.state_dict()
    other = read(Keeping(6), batch_size=2, microbatches=1)
    other.source.load_state_dict(state)
    assert samples(other, range(4, 8)) == whole[6:]


def test_a_stream_without_a_position_trains_but_says_that_it_cannot_resume() -> None:
    data = read(Stream(6), batch_size=3)
    assert not data.can_resume
    data.source.batch(1, 0)
    state = data.source.state_dict()
    assert state is not None
    with pytest.raises(InputError, match=r"cannot resume: it has no state_dict\(\)"):
        data.source.load_state_dict(state)


@pytest.mark.parametrize(
    ("dataset", "reading", "message"),
    [
        (Pairs(0), {}, "is empty"),
        ([], {}, "is empty"),
        (DataLoader(Pairs(4), batch_size=8, drop_last=True), {}, "is empty"),
        (
            Pairs(10),
            {"batch_size": 4},
            "10 samples do not divide into batches of 4: 2 are left",
        ),
        (Pairs(3), {"batch_size": 4, "drop_last": True}, "3 samples do not divide"),
        (
            DataLoader(Pairs(10), batch_size=4),
            {},
            "the last batch has 2 samples, the others have 4",
        ),
        (batches(4, 4, 3), {}, "the last batch has 3 samples, the others have 4"),
        (batches(4, 2, 4), {"drop_last": True}, "batch 1 has 2 samples"),
        (batches(4), {"microbatches": 3}, "4 samples does not make 3 equal micro-batches"),
        (batches(4), {"batch_size": 2}, "has a size of its own"),
        (iter(batches(4)), {}, "can be read only once"),
        (5, {}, "a int is no dataset"),
        ([torch.zeros(())], {}, "without targets"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_clear_error(
    dataset: Any, reading: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(dataset, **reading)
    assert caught.value.remedy


def test_a_short_end_is_left_out_where_asked() -> None:
    assert read(Pairs(10), batch_size=4, drop_last=True).steps_per_epoch == 2
    assert read(batches(4, 4, 3), drop_last=True).steps_per_epoch == 2
    assert read(DataLoader(Pairs(10), batch_size=4), drop_last=True).steps_per_epoch == 2
    stream = read(Stream(5), batch_size=2, microbatches=1, drop_last=True)
    assert samples(stream, range(1, 4)) == [0, 1, 2, 3, 0, 1]
    with pytest.raises(InputError, match="ended in step 3: 1 of 2 samples are left"):
        samples(read(Stream(5), batch_size=2, microbatches=1), range(1, 4))


def test_a_stream_that_gives_nothing_the_second_time_says_so() -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.iterator = iter(Stream(2))

        def __iter__(self) -> Iterator[Any]:
            return self.iterator

    data = read(Once(), batch_size=2, microbatches=1)
    data.source.batch(1, 0)
    with pytest.raises(InputError, match="gave nothing in epoch 2"):
        data.source.batch(2, 0)


def test_batches_of_another_shape_are_named() -> None:
    wide = (torch.zeros(4, 5), torch.zeros(4))
    data = read([*batches(4), wide], microbatches=2)
    data.source.batch(1, 0)
    with pytest.raises(InputError, match=r"step 2, micro-batch 0: input is \[2, 5\] float32"):
        data.source.batch(2, 0)


def test_processes_of_a_loader_become_readers_but_not_for_a_stream() -> None:
    loader = DataLoader(Pairs(4), num_workers=1, prefetch_factor=4)
    data = read(loader)
    assert (data.readers, data.prefetch) == (1, 4)
    assert idle_readers(loader, data) is None
    assert read(DataLoader(Pairs(4))).readers == 0
    stream = DataLoader(Stream(4), batch_size=2, num_workers=1)
    told = idle_readers(stream, read(stream))
    assert told is not None
    assert told.startswith("num_workers=1 of the DataLoader is not used: a stream")
