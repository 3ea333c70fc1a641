"""Sections `checkpoint` and `logging`: what a run writes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, Strict

from deepopt.config_fields import Count, Index, Positive, Seconds, Section, Text


class CheckpointConfig(Section):
    """What is written to the disk, and when."""

    every: Index = Field(
        default=20, description="Steps between checkpoints; 0: only at the end and at a stop."
    )
    keep: Annotated[int, Strict(), Field(ge=2)] = Field(
        default=2, description="Verified checkpoints to keep; at least 2."
    )
    timeout_s: Seconds = Field(
        default=300.0,
        description="Longest wait for the checkpoint before, in seconds; then one is left out.",
    )
    directory: Text | None = Field(
        default=None,
        description="Where checkpoints go, seen by all hosts; "
        "null: `checkpoints/` in the run directory.",
    )


class LoggingConfig(Section):
    """What is written for people."""

    every: Count = Field(default=1, description="Steps between two lines of progress.")
    tensorboard: Annotated[bool, Strict()] = Field(
        default=True, description="Write TensorBoard event files."
    )
    trace_steps: tuple[Count, ...] = Field(
        default=(), description="Steps of which a Perfetto trace is written."
    )
    peak_flops: Positive | None = Field(
        default=None,
        description="Peak of one device in FLOP/s, for MFU; null: from a table of devices.",
    )
