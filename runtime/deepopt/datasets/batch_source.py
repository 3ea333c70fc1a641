"""From a job's `data` section to batches: text, or whatever a user's dataset factory returns.

A batch is a function of (seed, step, micro-batch), so a run's cursor is one number and each
worker at an end of the pipeline finds its batches by itself. The exception is a stream, which
keeps a position (`stream`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from deepopt.config import JobConfig
from deepopt.datasets.indexed import IndexedSource
from deepopt.datasets.samples import Batch
from deepopt.datasets.text import read_files, read_standard_library
from deepopt.datasets.token_file import tokens_of
from deepopt.datasets.tokenizer import load_tokenizer
from deepopt.datasets.user_dataset import user_source
from deepopt.errors import InputError


class BatchSource(Protocol):
    """Where workers that hold the first or the last layers get their batches from."""

    @property
    def fingerprint(self) -> str:
        """The same only for the same data."""
        ...

    @property
    def description(self) -> str:
        """For people: what and how much."""
        ...

    @property
    def vocab_size(self) -> int | None:
        """Token ids are below it; None when unknown."""
        ...

    @property
    def tokens_per_microbatch(self) -> int:
        """For throughput; samples where they are not made of tokens."""
        ...

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets.

        Args:
            step: from 1.
            microbatch: index within the step, over all replicas.
        """
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """JSON-ready position after the last step asked for; None when the step says it all."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after what `state_dict` gave."""
        ...


def build_batch_source(job: JobConfig, *, run_dir: Path | None) -> BatchSource:
    """Make the source that a job's `data` section asks for.

    Args:
        job: the job.
        run_dir: where token ids may be kept between restarts, in `tokens/`; None: keep nothing.

    Raises:
        InputError: no text, too little text, no such tokenizer, or a factory that does not fit.
    """
    if job.data.dataset is not None:
        return user_source(job)
    return _text_source(job, run_dir=run_dir)


def _text_source(job: JobConfig, *, run_dir: Path | None) -> BatchSource:
    text = read_files(job.data.files) if job.data.files else read_standard_library()
    tokenizer = load_tokenizer(job.data.tokenizer)
    folder = None if run_dir is None else run_dir / "tokens"
    tokens = tokens_of(text, tokenizer, folder=folder)
    length = job.data.sequence_length
    num_samples = (len(tokens) - 1) // length
    if num_samples < 1:
        raise InputError(
            f"data.files: {len(tokens)} token(s) of text are less than one sequence and its last "
            f"target, {length} + 1",
            remedy="name more text, or lower data.sequence_length",
        )

    identity = f"{text.fingerprint()}/{tokenizer.identity}"

    def get_sample(index: int) -> Batch:
        window = tokens[index * length : (index + 1) * length + 1].long()
        return window[:-1], window[1:]

    return IndexedSource(
        get_sample,
        num_samples=num_samples,
        job=job,
        tokens_per_sample=length,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
        description=f"{text.description}, {num_samples:,} sequences of {length} "
        f"{'bytes' if job.data.tokenizer == 'bytes' else 'tokens'}",
        vocab_size=tokenizer.vocab_size,
        name="data.files",
    )
