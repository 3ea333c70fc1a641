"""Batches of samples that can be had by index: shuffled anew each epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepopt.config import JobConfig
from deepopt.datasets.order import sample_index
from deepopt.datasets.samples import Batch, stack
from deepopt.errors import InputError


class IndexedSource:
    """Batches of samples that can be had by index: shuffled anew each epoch, none left out,
    none twice.

    Args:
        get_sample: (input, target) of an index.
        num_samples: indices are below it.
        job: gives seed and sizes.
        tokens_per_sample: for throughput.
        fingerprint: tells one dataset from another.
        description: for people.
        vocab_size: None when unknown.
        name: of the dataset, for errors.
    """

    def __init__(
        self,
        get_sample: Callable[[int], Batch],
        *,
        num_samples: int,
        job: JobConfig,
        tokens_per_sample: int,
        fingerprint: str,
        description: str,
        vocab_size: int | None,
        name: str,
    ) -> None:
        self.fingerprint = fingerprint
        self.description = description
        self.vocab_size = vocab_size
        self.tokens_per_microbatch = tokens_per_sample * job.training.microbatch_size
        self._get_sample = get_sample
        self._num_samples = num_samples
        self._training = job.training
        self._name = name

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets, each [microbatch_size, ...].

        Args:
            step: from 1.
            microbatch: index within the step, over all replicas.
        """
        training = self._training
        first = ((step - 1) * training.microbatches + microbatch) * training.microbatch_size
        indices = [
            sample_index(position, num_samples=self._num_samples, seed=training.seed)
            for position in range(first, first + training.microbatch_size)
        ]
        where = f"{self._name}: step {step}, micro-batch {microbatch}, samples {indices}"
        return stack([self._get_sample(index) for index in indices], where=where)

    @property
    def num_samples(self) -> int:
        """Of one epoch."""
        return self._num_samples

    @property
    def num_microbatches(self) -> int:
        """Whole micro-batches of one epoch."""
        return self._num_samples // self._training.microbatch_size

    def state_dict(self) -> None:
        """Nothing: the step says it all."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse: a state can only be another dataset's.

        Raises:
            InputError: always.
        """
        raise not_a_stream(self._name, state)


def not_a_stream(name: str, state: dict[str, Any]) -> InputError:
    """The error of a source without a position that is given one.

    Args:
        name: of the dataset.
        state: what the checkpoint holds.
    """
    return InputError(
        f"{name}: the checkpoint holds the position of a stream (after step "
        f"{state.get('step')}), but this dataset is not one",
        remedy="resume with the data section that the run was started with",
    )
