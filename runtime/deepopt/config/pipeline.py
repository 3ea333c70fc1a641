"""Sections `pipeline` and `parallel`: where layers live, and in which order they work."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from deepopt.config_fields import Count, Index, Seconds, Section, Text, refuse

BUILT_AXES = ("pipeline", "data")
LATER_AXES = ("expert", "context", "tensor", "fsdp")


class PipelineConfig(Section):
    """Where layers live and in which order they work."""

    placement: Literal["auto", "line", "v", "mirror"] = Field(
        default="auto",
        description="Stages on ranks: `line` (one after the other), `v` (folded once), "
        "`mirror` (each stage on two ranks, micro-batches from both ends), `auto`.",
    )
    schedule: Text = Field(
        default="auto",
        description="Name of the order of work (`gpipe`, `1f1b`, `bi_stream`, ...); `auto`: searched, "
        "over all placements that `placement` leaves open; `file:ORDER.csv`: an order of your own "
        "(docs/schedules.md).",
    )
    calibrate: Annotated[bool, Strict()] = Field(
        default=True,
        description="Measure one layer of each kind for a second before a schedule is searched, where "
        "the workers run on this machine; `false`: estimate from operation counts.",
    )
    boundaries: tuple[Index, ...] | None = Field(
        default=None,
        description="Index of the first layer of each stage, starting with 0; null: planned.",
    )
    recompute: Literal["none", "full", "auto"] = Field(
        default="none",
        description="`full` keeps only the inputs of the layers and repeats the forward for "
        "the backward: less memory, more time, the same numbers. `auto`: of as few layers as the "
        "memory of their rank needs, where that is known.",
    )
    overlap_steps: Annotated[bool, Strict()] = Field(
        default=False,
        description="Begin the next step before the norms of this one are known, and take that "
        "back when gradients had to be clipped: a smaller bubble, the same numbers, one more copy of "
        "weights and moments. Not with data from a stream.",
    )
    receive_lookahead: Count = Field(
        default=2, description="Receives posted ahead of the action that needs them, a channel."
    )
    timeout_s: Seconds = Field(
        default=600.0, description="Longest wait for one send or receive, in seconds."
    )
    same_host: Literal["shared_memory", "sockets"] = Field(
        default="shared_memory",
        description="How workers of one host pass CPU tensors to each other (on GPUs: copies of layers' "
        "states). `sockets`: as between hosts, if shared memory makes trouble; the same numbers.",
    )

    @model_validator(mode="after")
    def _boundaries_ascend(self) -> Self:
        edges = self.boundaries
        if edges is not None and (
            not edges or edges[0] != 0 or any(a >= b for a, b in itertools.pairwise(edges))
        ):
            refuse(
                f"boundaries {list(edges)} do not start with 0 and ascend strictly",
                remedy="list the index of the first layer of each stage, for example [0, 3, 6]",
                fields=("boundaries",),
            )
        return self


class ParallelConfig(Section):
    """Workers along each axis of the mesh."""

    pipeline: Count | None = Field(
        default=None, description="Ranks of one pipeline; null: workers / data."
    )
    data: Count = Field(default=1, description="Replicas of the pipeline.")
    expert: Count = Field(default=1, description="Not built yet: only 1.")
    context: Count = Field(default=1, description="Not built yet: only 1.")
    tensor: Count = Field(default=1, description="Not built yet: only 1.")
    fsdp: Count = Field(default=1, description="Not built yet: only 1.")

    @model_validator(mode="after")
    def _only_built_axes(self) -> Self:
        wanted = {axis: getattr(self, axis) for axis in LATER_AXES if getattr(self, axis) != 1}
        if wanted:
            refuse(
                "not built yet: "
                + ", ".join(f"{axis}={size}" for axis, size in wanted.items()),
                remedy=f"leave {'it' if len(wanted) == 1 else 'them'} at 1; what works: "
                + " and ".join(f"parallel.{axis}" for axis in BUILT_AXES),
                fields=tuple(wanted),
            )
        return self
