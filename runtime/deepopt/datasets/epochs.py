"""Steps of a script's dataset that can be had by number: epoch after epoch, each shuffled anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import default_collate

from deepopt.datasets.indexed import not_a_stream
from deepopt.datasets.layout import (
    Layout,
    SameShapes,
    filled_up,
    num_tokens,
    split,
    to_batch,
)
from deepopt.datasets.order import sample_index
from deepopt.datasets.samples import Batch, sample_of
from deepopt.datasets.seeded import seeded
from deepopt.errors import InputError

_EPOCHS_KEPT = 2  # orders: the first stage may be a step ahead of the last
_STEPS_KEPT = 2  # batches, for the same reason


class EpochSource:
    """Micro-batches of a dataset with `len()` and `[index]`, or of a sequence of batches.

    Args:
        dataset: its elements are samples, or batches of a step where `collate` is None.
        layout: sizes of a step.
        steps_per_epoch: whole ones.
        collate: makes a batch of a list of samples; None where elements are batches.
        shuffle: in an order of its own in each epoch, by the layout's seed.
        sampler: gives the indices of each step of an epoch, instead of `shuffle`; it is asked once
            an epoch, with generators seeded by seed and epoch.
        num_samples: of an epoch, where its last step may lack some: it is filled up with its last
            sample again and again; None: all steps are whole.
        on_reader: called with its number in each process that reads ahead.
        name: of the dataset, for errors.
        fingerprint: tells one dataset from another.
        description: for people.
    """

    vocab_size = None

    def __init__(
        self,
        dataset: Any,
        *,
        layout: Layout,
        steps_per_epoch: int,
        name: str,
        fingerprint: str,
        description: str,
        collate: Callable[[list[Any]], Any] | None = default_collate,
        shuffle: bool = True,
        sampler: Any = None,
        num_samples: int | None = None,
        on_reader: Callable[[int], Any] | None = None,
    ) -> None:
        self.fingerprint = fingerprint
        self.description = description
        self.tokens_per_microbatch = layout.microbatch_size
        self.steps_per_epoch = steps_per_epoch
        self.num_samples = num_samples
        self._dataset = dataset
        self._layout = layout
        self._collate = collate
        self._shuffle = shuffle
        self._sampler = sampler
        self._name = name
        self._on_reader = on_reader
        self._orders: dict[int, Sequence[Sequence[int]]] = {}
        self._parts: dict[int, list[Batch]] = {}
        self._shapes = SameShapes(name)

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets.

        Args:
            step: from 1.
            microbatch: index within the step.

        Raises:
            InputError: the dataset gave something that is no batch, or one of another shape.
        """
        layout = self._layout
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        where = f"{self._name}: step {step}"
        if self._collate is None:
            batch = self._cut(step, index, where=where)[microbatch]
        else:
            size = layout.microbatch_size
            chosen = self._indices(epoch, index)[microbatch * size : (microbatch + 1) * size]
            with seeded(layout.seed, step, microbatch):
                place = f"{where}, micro-batch {microbatch}"
                samples = [sample_of(self._dataset, i, where=place) for i in chosen]
                collated = self._collate(samples)
            batch = to_batch(collated, layout=layout, where=place)
        self.tokens_per_microbatch = num_tokens(batch)
        return self._shapes.check(batch, step=step, microbatch=microbatch)

    def begin_reader(self, number: int) -> None:
        """Get ready in a process that reads ahead.

        Args:
            number: of the process, from 0.
        """
        if self._on_reader is not None:
            self._on_reader(number)

    @property
    def num_microbatches(self) -> int:
        """Of one epoch."""
        return self.steps_per_epoch * self._layout.microbatches

    def state_dict(self) -> None:
        """Nothing: the step says it all."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse: a state can only be another dataset's.

        Raises:
            InputError: always.
        """
        raise not_a_stream(self._name, state)

    def _cut(self, step: int, index: int, *, where: str) -> list[Batch]:
        """The micro-batches of a step's batch."""
        if step not in self._parts:
            for known in [s for s in self._parts if s <= step - _STEPS_KEPT]:
                del self._parts[known]
            with seeded(self._layout.seed, step):
                whole = self._dataset[index]
            batch = to_batch(whole, layout=self._layout, where=where)
            if self.num_samples is not None:
                batch = filled_up(batch, size=self._layout.batch_size)
            self._parts[step] = split(batch, layout=self._layout, where=where)
        return self._parts[step]

    def _indices(self, epoch: int, index: int) -> Sequence[int]:
        """The samples of a step."""
        size = self._layout.batch_size
        if self._sampler is not None:
            return self._order(epoch)[index]
        length = len(self._dataset)
        positions = range(index * size, (index + 1) * size)
        if not self._shuffle:
            return [min(position, length - 1) for position in positions]
        seed = self._layout.seed
        return [
            sample_index(epoch * length + p, num_samples=length, seed=seed) for p in positions
        ]

    def _order(self, epoch: int) -> Sequence[Sequence[int]]:
        if epoch not in self._orders:
            for known in [e for e in self._orders if e <= epoch - _EPOCHS_KEPT]:
                del self._orders[known]
            order = epoch_order(self._sampler, epoch=epoch, seed=self._layout.seed)
            size = self._layout.batch_size
            if self.num_samples is not None:
                order = [[*own, *own[-1:] * (size - len(own))] for own in order]
            self._orders[epoch] = [indices for indices in order if len(indices) == size]
            if len(self._orders[epoch]) < self.steps_per_epoch:
                raise InputError(
                    f"{self._name}: its sampler gave {len(self._orders[epoch])} batches in epoch "
                    f"{epoch + 1}, {self.steps_per_epoch} in the first",
                    remedy="let it give equally many in each epoch",
                )
        return self._orders[epoch]


def epoch_order(sampler: Any, *, epoch: int, seed: int) -> list[list[int]]:
    """The indices of each batch of an epoch, as a batch sampler gives them.

    Args:
        sampler: gives lists of indices; `set_epoch` of it or of its own sampler is called, and their
            `generator` is seeded by seed and epoch, like the global ones.
        epoch: from 0.
        seed: of the data order.
    """
    for one in (sampler, getattr(sampler, "sampler", None)):
        if callable(set_epoch := getattr(one, "set_epoch", None)):
            set_epoch(epoch)
        if (generator := getattr(one, "generator", None)) is not None:
            generator.manual_seed(seed + epoch)
    with seeded(seed, "order", epoch):
        return [list(batch) for batch in sampler]
