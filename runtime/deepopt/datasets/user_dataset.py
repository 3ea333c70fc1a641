"""What a user's dataset factory returned, as a source of batches.

In this order: an object with `batch(step, microbatch)`, one with `len()` and `[index]`, a
stream. Optional attributes of any of them: `description`, `fingerprint`, `vocab_size`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.datasets.epoch_stream import EpochStream
from deepopt.datasets.epochs import EpochSource
from deepopt.datasets.indexed import IndexedSource, not_a_stream
from deepopt.datasets.samples import Batch, sample_of, to_pair
from deepopt.datasets.stream import StreamSource
from deepopt.errors import DeepoptError, InputError
from deepopt.import_path import describe_raise, import_object


class OwnBatches:
    """A user's object that has `batch(step, microbatch)` itself, a function of its arguments.

    Args:
        dataset: the object; may also have `tokens_per_microbatch`.
        default_tokens: of a micro-batch, where it has not.
        fingerprint: tells one dataset from another.
        description: for people.
        vocab_size: None when unknown.
        name: of the dataset, for errors.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        default_tokens: int,
        fingerprint: str,
        description: str,
        vocab_size: int | None,
        name: str,
    ) -> None:
        self.fingerprint = fingerprint
        self.description = description
        self.vocab_size = vocab_size
        self.tokens_per_microbatch: int = getattr(
            dataset, "tokens_per_microbatch", default_tokens
        )
        self.num_microbatches: int | None = getattr(dataset, "num_microbatches", None)
        self._dataset = dataset
        self._name = name

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets.

        Args:
            step: from 1.
            microbatch: index within the step, over all replicas.

        Raises:
            InputError: the object gave something else.
        """
        batch = self._dataset.batch(step, microbatch)
        if not (
            isinstance(batch, (tuple, list))
            and len(batch) == 2
            and _are_inputs(batch[0])
            and isinstance(batch[1], torch.Tensor)
        ):
            raise InputError(
                f"{self._name}: batch({step}, {microbatch}) gave a {type(batch).__name__}",
                remedy="return a pair (inputs, targets): a tensor or a dict of tensors, and a tensor",
            )
        return batch[0], batch[1]

    def state_dict(self) -> None:
        """Nothing: the step says it all."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse: a state can only be another dataset's.

        Raises:
            InputError: always.
        """
        raise not_a_stream(self._name, state)


def user_source(
    job: JobConfig,
) -> IndexedSource | OwnBatches | StreamSource | EpochSource | EpochStream:
    """Call the factory that `data.dataset` names and make a source of what it returns.

    Args:
        job: the job; `data.dataset` is set.

    Raises:
        InputError: the factory fails, or returns something that is no dataset.
    """
    path, length, batch_size = (
        job.data.dataset,
        job.data.sequence_length,
        job.training.microbatch_size,
    )
    assert path is not None, "user_source() without data.dataset"
    name = f"data.dataset: {path}"
    dataset = _call_factory(path, job.data.kwargs)
    if isinstance(dataset, EpochSource | EpochStream):  # made by a script's trainer
        return dataset
    about: dict[str, Any] = {
        "fingerprint": _fingerprint(dataset, path, job.data.kwargs),
        "description": getattr(dataset, "description", f"{type(dataset).__name__} of {path}"),
        "vocab_size": getattr(dataset, "vocab_size", None),
        "name": name,
    }
    if callable(getattr(dataset, "batch", None)):
        return OwnBatches(dataset, default_tokens=batch_size * length, **about)
    if _is_indexed(dataset):
        if len(dataset) < 1:
            raise InputError(
                f"{name} gave a dataset without samples", remedy="check data.kwargs"
            )

        def get_sample(index: int) -> Batch:
            where = f"{name}: sample {index}"
            sample = sample_of(dataset, index, where=name)
            return to_pair(sample, sequence_length=length, where=where)

        target = get_sample(0)[1]
        is_tokens = target.dim() > 0 and not target.is_floating_point()
        return IndexedSource(
            get_sample,
            num_samples=len(dataset),
            job=job,
            tokens_per_sample=target.numel() if is_tokens else 1,
            **about,
        )
    if hasattr(dataset, "__iter__"):
        return StreamSource(
            dataset,
            microbatches=job.training.microbatches,
            microbatch_size=batch_size,
            sequence_length=length,
            **about,
        )
    raise InputError(
        f"{name} returned {type(dataset).__name__}, which is no dataset",
        remedy="return something with len() and [index], or with batch(step, microbatch), or a "
        "stream with state_dict() and load_state_dict()",
    )


def _are_inputs(inputs: Any) -> bool:
    if isinstance(inputs, Mapping):
        return bool(inputs) and all(isinstance(x, torch.Tensor) for x in inputs.values())
    return isinstance(inputs, torch.Tensor)


def _is_indexed(dataset: Any) -> bool:
    return hasattr(type(dataset), "__len__") and hasattr(type(dataset), "__getitem__")


def _fingerprint(dataset: Any, path: str, kwargs: dict[str, Any]) -> str:
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    size = len(dataset) if _is_indexed(dataset) else None
    words = json.dumps([path, kwargs, size], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _call_factory(path: str, kwargs: dict[str, Any]) -> Any:
    factory = import_object(path, field="data.dataset")
    try:
        return factory(**kwargs)
    except DeepoptError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"data.dataset: {path} raised {describe_raise(error)}",
            remedy=f"check data.kwargs ({kwargs})",
        ) from error
