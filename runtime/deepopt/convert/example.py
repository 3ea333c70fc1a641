"""Example inputs of a job's model, as its data gives them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from deepopt.config import JobConfig
from deepopt.datasets.batch_source import build_batch_source
from deepopt.errors import DeepoptError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What one micro-batch gives to the model.

    Args:
        args: by position.
        kwargs: by name, in the order of the names: that of `model_inputs`.
        tokens: of the micro-batch; samples where they are not made of tokens.
    """

    args: tuple[torch.Tensor, ...]
    kwargs: Mapping[str, torch.Tensor]
    tokens: int


def example_of(job: JobConfig) -> Example:
    """The inputs of micro-batch 0 of step 1; of text only their shape, without reading it.

    Where that has attention masks and no padding, those of the first micro-batch of the step that has both:
    a forward that makes its masks serves all micro-batches, one that left them out does not.

    Args:
        job: names the data.

    Raises:
        InputError: the dataset's factory fails, or its code raises.
    """
    size, length = job.training.microbatch_size, job.data.sequence_length
    if job.data.dataset is None:
        ids = torch.ones(size, length, dtype=torch.int64)  # any token that every tokenizer has
        return Example(args=(ids,), kwargs={}, tokens=size * length)
    try:
        return _first_of(job)
    except DeepoptError:
        raise
    except Exception as error:  # the user's code may raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"the dataset raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
            remedy="it was asked for the first micro-batch; correct its code",
        ) from error


def _first_of(job: JobConfig) -> Example:
    source = build_batch_source(job, run_dir=None)
    inputs = source.batch(1, 0)[0]
    tokens = source.tokens_per_microbatch
    if isinstance(inputs, Mapping):
        others = range(1, job.training.microbatches if _masks(inputs) else 1)
        if not _is_padded(inputs):
            given = (source.batch(1, microbatch)[0] for microbatch in others)
            inputs = next(
                (i for i in given if isinstance(i, Mapping) and _is_padded(i)), inputs
            )
        return Example(args=(), kwargs=dict(sorted(inputs.items())), tokens=tokens)
    return Example(args=(inputs,), kwargs={}, tokens=tokens)


def _masks(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [t for name, t in inputs.items() if name.endswith("attention_mask")]


def _is_padded(inputs: Mapping[str, torch.Tensor]) -> bool:
    return any(not bool(mask.all()) for mask in _masks(inputs))
