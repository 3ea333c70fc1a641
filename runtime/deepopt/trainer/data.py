"""From whatever a user calls data to steps: a source of micro-batches, and how many there are."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from deepopt.convert.chain import named_layers
from deepopt.datasets.epoch_stream import EpochStream
from deepopt.datasets.epochs import EpochSource, epoch_order
from deepopt.datasets.layout import Layout, with_targets
from deepopt.errors import InputError

DEFAULT_BATCH_SIZE = 32
MOST_MICROBATCHES = 8  # by default: enough for a pipeline of four


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """A dataset made ready.

    Args:
        source: gives micro-batches; is pickled for the workers.
        layout: sizes of a step.
        steps_per_epoch: None for a stream, which does not say how long it is.
        readers: processes that read ahead, of each worker that reads.
        prefetch: micro-batches that each of them has in work or ready.
    """

    source: EpochSource | EpochStream
    layout: Layout
    steps_per_epoch: int | None
    readers: int = 0
    prefetch: int = 2

    @property
    def can_resume(self) -> bool:
        """Whether a run on it can go on from a checkpoint."""
        return isinstance(self.source, EpochSource) or self.source.can_resume


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How `fit` was told to read its dataset.

    Args:
        batch_size: samples of a step; None: the dataset's own, else 32, or all where there are less.
        microbatches: of a step; None: as many as divide it, at most 8.
        shuffle: samples of a map-style dataset in an order of its own in each epoch.
        drop_last: leave out what does not fill a step at the end of an epoch.
        collate: makes a batch of a list of samples; None: torch's default.
        seed: of the order and of the data code's random numbers.
        fills_up: fill up the last step of an epoch instead of leaving it out.
        needs_targets: whether batches without targets are an error.
    """

    batch_size: int | None = None
    microbatches: int | None = None
    shuffle: bool = True
    drop_last: bool = False
    collate: Any = None
    seed: int = 0
    fills_up: bool = False
    needs_targets: bool = True


def read_data(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    """Make a dataset ready.

    Args:
        dataset: a torch `DataLoader`, `IterableDataset` or `Dataset` (anything with `len()` and
            `[index]` that gives samples), a list of batches, or another iterable of batches.
        model: whose forward names the inputs.
        reading: how.

    Raises:
        InputError: it is empty, can be read only once, or does not divide into steps.
    """
    if isinstance(dataset, DataLoader) and type(dataset).__iter__ is DataLoader.__iter__:
        return _loader(dataset, model=model, reading=reading)
    if isinstance(dataset, IterableDataset):
        return _sample_stream(dataset, model=model, reading=reading)
    if isinstance(dataset, list | tuple):
        return _batches(dataset, model=model, reading=reading)
    if _has(dataset, "__len__", "__getitem__") and not isinstance(dataset, Mapping):
        return _samples(dataset, model=model, reading=reading)
    if isinstance(dataset, Iterator):
        raise InputError(
            f"the dataset is a {type(dataset).__name__}, which can be read only once and not from "
            "several processes",
            remedy="give a list of batches, or an object whose __iter__ begins anew each time",
        )
    if _has(dataset, "__iter__") and not isinstance(dataset, Mapping | str | bytes):
        return _batch_stream(dataset, model=model, reading=reading)
    raise InputError(
        f"a {type(dataset).__name__} is no dataset",
        remedy="give a torch Dataset, IterableDataset or DataLoader, or an iterable of batches",
    )


def idle_readers(dataset: Any, data: Data) -> str | None:
    """What a user of a `DataLoader` should know whose processes nobody needs; None where there are none.

    Args:
        dataset: as for `read_data`.
        data: what that made of it.
    """
    count = dataset.num_workers if isinstance(dataset, DataLoader) else 0
    if not count or data.readers:
        return None
    return (
        f"num_workers={count} of the DataLoader is not used: a stream is read in order, by each worker that "
        "holds the first or the last layers"
    )


def read_evaluation(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    """Make a dataset ready to be measured: in its own order, its last batch filled up.

    Args:
        dataset: as for `read_data`, with `len()`.
        model: whose forward names the inputs.
        reading: how a training set is read.

    Raises:
        InputError: as `read_data`; or it is a stream.
    """
    own = replace(reading, shuffle=False, drop_last=False, fills_up=True)
    return _measurable(read_data(dataset, model=model, reading=own), dataset)


def read_prediction(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    """Make a dataset ready to be predicted: as `read_evaluation`, with or without targets.

    Args:
        dataset: as for `read_data`, with `len()`.
        model: whose forward names the inputs.
        reading: how a training set is read.

    Raises:
        InputError: as `read_evaluation`; or its order is random.
    """
    if isinstance(dataset, DataLoader):
        kinds = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
        if isinstance(dataset.sampler, kinds):
            raise InputError(
                f"the DataLoader draws its samples at random ({type(dataset.sampler).__name__}): "
                "outputs could not be told apart",
                remedy="make it with shuffle=False, or give its dataset",
            )
    return read_evaluation(dataset, model=model, reading=replace(reading, needs_targets=False))


def _measurable(found: Data, dataset: Any) -> Data:
    if not isinstance(found.source, EpochSource):
        raise InputError(
            f"a {type(dataset).__name__} is a stream, which cannot be measured again and again",
            remedy="give a torch Dataset with len() and [index], a DataLoader of one, or a list of "
            "batches",
        )
    return found


def read_validation(
    dataset: Any, *, data: Data, model: torch.nn.Module, reading: Reading
) -> Data:
    """Make a validation set ready: in its own order, in micro-batches as those of training.

    Args:
        dataset: as for `read_data`, with `len()`.
        data: that the model is trained on.
        model: whose forward names the inputs.
        reading: how the training set is read.

    Raises:
        InputError: as `read_data`; or it is a stream, or its batches have another size.
    """
    is_batches = isinstance(dataset, DataLoader | list | tuple)
    own = replace(
        reading,
        batch_size=None if is_batches else data.layout.batch_size,
        microbatches=data.layout.microbatches,
        shuffle=False,
        drop_last=True,
        collate=None if isinstance(dataset, DataLoader) else reading.collate,
    )
    found = _measurable(read_data(dataset, model=model, reading=own), dataset)
    if found.layout.batch_size != data.layout.batch_size:
        raise InputError(
            f"validation: its batches have {found.layout.batch_size} samples, those of training "
            f"{data.layout.batch_size}",
            remedy="give both the same size: the stages exchange tensors of fixed shapes",
        )
    return found


def _samples(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    length = len(dataset)
    default = DEFAULT_BATCH_SIZE if reading.fills_up else min(DEFAULT_BATCH_SIZE, length or 1)
    layout = _layout(model, reading, batch_size=reading.batch_size or default)
    source = EpochSource(
        dataset,
        layout=layout,
        steps_per_epoch=_steps(length, layout, reading=reading),
        collate=reading.collate or default_collate,
        shuffle=reading.shuffle,
        num_samples=length if reading.fills_up else None,
        **_about(dataset, order=["shuffle", reading.shuffle]),
    )
    return Data(source=source, layout=layout, steps_per_epoch=source.steps_per_epoch)


def _batches(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    """A list of batches: each one a step."""
    _refuse_size(reading, what="a list of batches")
    if not dataset:
        raise _empty(dataset)
    known = dataset if reading.needs_targets else map(with_targets, dataset)
    sizes = [batch_length(batch) for batch in known]
    size = sizes[0]
    layout = _layout(model, reading, batch_size=size)
    whole = _whole_batches(sizes, size=size, reading=reading)
    source = EpochSource(
        dataset,
        layout=layout,
        steps_per_epoch=whole,
        collate=None,
        num_samples=sum(sizes) if reading.fills_up else None,
        **_about(dataset, order=["batches"]),
    )
    return Data(source=source, layout=layout, steps_per_epoch=whole)


def _loader(loader: DataLoader[Any], *, model: torch.nn.Module, reading: Reading) -> Data:
    if reading.collate is not None:
        raise InputError("collate_fn is given, and a DataLoader has one of its own")
    dataset: Any = loader.dataset
    if loader.batch_sampler is None and not isinstance(dataset, IterableDataset):
        return _batch_stream(loader, model=model, reading=reading)
    if isinstance(dataset, IterableDataset):
        if loader.batch_size is None:
            return _batch_stream(dataset, model=model, reading=reading)
        _refuse_size(reading, what="a DataLoader")
        own = Reading(
            batch_size=loader.batch_size,
            microbatches=reading.microbatches,
            drop_last=loader.drop_last or reading.drop_last,
            collate=loader.collate_fn,
            seed=reading.seed,
        )
        return _sample_stream(dataset, model=model, reading=own)
    _refuse_size(reading, what="a DataLoader")
    sampler: Any = loader.batch_sampler
    sizes = [len(batch) for batch in epoch_order(sampler, epoch=0, seed=reading.seed)]
    if not sizes:
        raise _empty(dataset)
    size = sizes[0]
    layout = _layout(model, reading, batch_size=size)
    whole = _whole_batches(sizes, size=size, reading=reading)
    source = EpochSource(
        dataset,
        layout=layout,
        steps_per_epoch=whole,
        collate=loader.collate_fn,
        sampler=sampler,
        num_samples=sum(sizes) if reading.fills_up else None,
        on_reader=loader.worker_init_fn,
        **_about(dataset, order=["sampler", type(sampler).__name__, size]),
    )
    return Data(
        source=source,
        layout=layout,
        steps_per_epoch=whole,
        readers=loader.num_workers,
        prefetch=loader.prefetch_factor or 2,
    )


def _sample_stream(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    layout = _layout(model, reading, batch_size=reading.batch_size or DEFAULT_BATCH_SIZE)
    source = EpochStream(
        dataset,
        layout=layout,
        drop_last=reading.drop_last,
        collate=reading.collate or default_collate,
        **_about(dataset, order=["samples"]),
    )
    steps = None
    if _has(dataset, "__len__"):
        steps = _steps(len(dataset), layout, reading=reading)
    return Data(source=source, layout=layout, steps_per_epoch=steps)


def _batch_stream(dataset: Any, *, model: torch.nn.Module, reading: Reading) -> Data:
    _refuse_size(reading, what="an iterable of batches")
    first = next(iter(dataset), None)
    if first is None:
        raise _empty(dataset)
    layout = _layout(model, reading, batch_size=batch_length(first))
    source = EpochStream(
        dataset,
        layout=layout,
        drop_last=reading.drop_last,
        collate=None,
        **_about(dataset, order=["batches"]),
    )
    steps = len(dataset) if _has(dataset, "__len__") else None
    return Data(source=source, layout=layout, steps_per_epoch=steps)


def batch_length(batch: Any) -> int:
    """Samples of a batch: the first dimension of its last tensor.

    Raises:
        InputError: it holds no tensor with a dimension.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, list | tuple):
        for value in reversed(values):
            if isinstance(value, torch.Tensor) and value.dim():
                return int(value.shape[0])
    raise InputError(
        f"a batch of the dataset is a {type(batch).__name__} without targets",
        remedy="batches are pairs (inputs, targets) or dicts of tensors; samples belong into a torch "
        "Dataset",
    )


def _layout(model: torch.nn.Module, reading: Reading, *, batch_size: int) -> Layout:
    count = reading.microbatches
    if count is None:
        count = max(n for n in range(1, MOST_MICROBATCHES + 1) if batch_size % n == 0)
    if count < 1 or batch_size < 1 or batch_size % count:
        raise InputError(
            f"a batch of {batch_size} samples does not make {count} equal micro-batches",
            remedy=f"set microbatches to a divisor of {batch_size}, or batch_size to a multiple of "
            f"{max(1, count)}",
        )
    names: tuple[str, ...] = ()
    takes_any = False
    if named_layers(model) is None:
        parameters = inspect.signature(model.forward).parameters.values()
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = tuple(p.name for p in parameters if p.kind in by_name)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Layout(
        microbatches=count,
        microbatch_size=batch_size // count,
        input_names=names,
        takes_any_name=takes_any,
        seed=reading.seed,
        needs_targets=reading.needs_targets,
    )


def _steps(num_samples: int, layout: Layout, *, reading: Reading) -> int:
    """Steps of an epoch: whole ones, or filled up."""
    if num_samples < 1:
        raise InputError("the dataset is empty: its len() is 0", remedy="check how it is made")
    steps, left = divmod(num_samples, layout.batch_size)
    if left and reading.fills_up:
        return steps + 1
    if left and (not reading.drop_last or not steps):
        divisor = math.gcd(num_samples, layout.batch_size)
        raise InputError(
            f"the dataset's {num_samples} samples do not divide into batches of "
            f"{layout.batch_size}: {left} are left",
            remedy="set drop_last=True to leave out a few of each epoch"
            + (f", or batch_size={divisor}" if divisor > 1 else "")
            if steps
            else f"set batch_size to {num_samples} or less",
        )
    return steps


def _whole_batches(sizes: list[int], *, size: int, reading: Reading) -> int:
    odd = [(index, one) for index, one in enumerate(sizes) if one != size]
    if not odd:
        return len(sizes)
    index, one = odd[0]
    is_last = len(odd) == 1 and index == len(sizes) - 1
    if is_last and reading.fills_up and one < size:
        return len(sizes)
    if is_last and reading.drop_last:
        return len(sizes) - 1
    where = "the last batch" if is_last else f"batch {index}"
    raise InputError(
        f"{where} has {one} samples, the others have {size}",
        remedy="set drop_last=True to leave it out"
        if is_last
        else "give all batches one size: tensors between the stages have one shape",
    )


def _refuse_size(reading: Reading, *, what: str) -> None:
    if reading.batch_size is not None:
        raise InputError(
            f"batch_size={reading.batch_size} is given, but {what} has a size of its own",
            remedy="leave batch_size out, or give the dataset itself",
        )


def _empty(dataset: Any) -> InputError:
    return InputError(
        f"the dataset ({type(dataset).__name__}) is empty", remedy="check how it is made"
    )


def _has(candidate: Any, *methods: str) -> bool:
    return all(hasattr(type(candidate), method) for method in methods)


def _about(dataset: Any, *, order: list[Any]) -> dict[str, Any]:
    """What a source says of itself."""
    kind = type(dataset).__name__
    length = len(dataset) if _has(dataset, "__len__") else None
    own = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    words = json.dumps([kind, length, order, own if isinstance(own, str) else None])
    many = "" if length is None else f", {length:,} long"
    return {
        "name": f"the dataset ({kind})",
        "fingerprint": hashlib.sha256(words.encode()).hexdigest()[:32],
        "description": f"{kind} of a script{many}",
    }
