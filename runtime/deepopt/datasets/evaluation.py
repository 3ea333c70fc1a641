"""The validation set of a job: its micro-batches in one order, the same at each evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deepopt.config import JobConfig
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.datasets.samples import Batch
from deepopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationBatches:
    """Micro-batches of a validation set.

    Args:
        source: where they come from.
        per_step: micro-batches that make a step of the source.
        num_microbatches: how many are evaluated.
        microbatch_size: samples of one.
        last_size: samples of the last one that count; its others are there for the shape.
    """

    source: BatchSource
    per_step: int
    num_microbatches: int
    microbatch_size: int
    last_size: int

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets.

        Args:
            step: is not looked at: each evaluation sees the same.
            microbatch: from 0.
        """
        extra, index = divmod(microbatch, self.per_step)
        return self.source.batch(1 + extra, index)


def with_evaluation_data(job: JobConfig) -> JobConfig:
    """The job with its validation set in the place of its data.

    Args:
        job: has one.
    """
    update = {
        "files": job.evaluation.files,
        "dataset": job.evaluation.dataset,
        "kwargs": job.evaluation.kwargs,
    }
    return job.model_copy(update={"data": job.data.model_copy(update=update)})


def evaluation_batches(job: JobConfig, *, run_dir: Path | None) -> EvaluationBatches:
    """Make ready the validation set of a job.

    Args:
        job: has one.
        run_dir: as for `build_batch_source`.

    Raises:
        InputError: it is a stream, has no whole micro-batch, or does not say how large it is.

    Evaluated between steps, what does not fill a micro-batch is left out. A job that only evaluates sees
    all samples: the last micro-batch is filled up, and `last_size` says how many of it count.
    """
    source = build_batch_source(with_evaluation_data(job), run_dir=run_dir)
    if source.state_dict() is not None:
        raise InputError(
            f"evaluation: {source.description} is a stream, which cannot be read again",
            remedy="give something with len() and [index], or with batch(step, microbatch)",
        )
    size = job.training.microbatch_size
    available = getattr(source, "num_microbatches", None)
    num_samples = getattr(source, "num_samples", None) if job.evaluation.alone else None
    if num_samples is not None:
        available = math.ceil(num_samples / size)
    wanted = job.evaluation.microbatches
    if available is None and wanted is None:
        raise InputError(
            f"evaluation: {source.description} does not say how large it is",
            remedy="set evaluation.microbatches, or give the dataset num_microbatches",
        )
    if available is not None and available < 1:
        raise InputError(
            f"evaluation: {source.description} is less than one micro-batch of {size}",
            remedy="name more data, or lower training.microbatch_size",
        )
    count = min(number for number in (available, wanted) if number is not None)
    return EvaluationBatches(
        source=source,
        per_step=job.training.microbatches,
        num_microbatches=count,
        microbatch_size=size,
        last_size=size if num_samples is None else min(size, num_samples - (count - 1) * size),
    )
