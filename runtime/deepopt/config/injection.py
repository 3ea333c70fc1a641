"""The fault script of a job file: which worker does what to itself, and when.

Only the keys: `deepopt.worker.fault_script` acts on them.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from deepopt.config_fields import Count, Index, Seconds, Section, Text, refuse

MOMENTS = ("EXCHANGE", "UPDATE", "SAVE")
"""Moments of a step besides its actions: before the exchange of norms, before weights change, before
a checkpoint's snapshot."""


class FaultPoint(Section):
    """The moment of a scripted fault."""

    rank: Index = Field(description="The worker that it happens to.")
    step: Count = Field(description="The step in which it happens.")
    op: Text | None = Field(
        default=None,
        description="The action before which it happens: an operation (`SEND_F`) or one action as "
        "printed in plans (`2F5`); or `EXCHANGE`, `UPDATE`, `SAVE`: before norms are exchanged, before "
        "weights change, before a checkpoint's snapshot. null: at the start of the step.",
    )
    generation: Count = Field(default=1, description="It happens in this generation alone.")


class FaultSpan(FaultPoint):
    """The moment and the length of a scripted fault."""

    duration_s: Seconds = Field(description="How long it lasts, in seconds.")


class FaultInjection(Section):
    """One scripted fault, for tests and drills: exactly one of the kinds."""

    kill: FaultPoint | None = Field(
        default=None, description="The worker kills itself (SIGKILL)."
    )
    stop: FaultPoint | None = Field(
        default=None, description="The worker stops itself (SIGSTOP): no thread of it runs."
    )
    hold: FaultPoint | None = Field(
        default=None,
        description="The worker keeps Python's GIL: it runs, and no thread of it says so.",
    )
    hang: FaultPoint | None = Field(
        default=None,
        description="The operation never ends; the worker's heartbeats go on.",
    )
    raise_: FaultPoint | None = Field(
        default=None, alias="raise", description="The worker raises an exception."
    )
    term: FaultPoint | None = Field(
        default=None,
        description="The worker gets SIGTERM, as before a machine is taken away; see `on_preemption`.",
    )
    cut: FaultPoint | None = Field(
        default=None,
        description="The worker's connections to its peers break; no process ends.",
    )
    flip: FaultPoint | None = Field(
        default=None,
        description="The highest exponent bit of one fp32 gradient is inverted, at the first moment from "
        "then on at which there is one; see `bad_step`.",
    )
    delay: FaultSpan | None = Field(
        default=None,
        description="The operation takes that much longer: no fault, a slow device.",
    )
    full_disk: FaultSpan | None = Field(
        default=None,
        description="For that long no file grows by what the worker writes (EFBIG), as on a full disk.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self._given()) != 1:
            kinds = ", ".join(_kind_of(name) for name in type(self).model_fields)
            refuse(
                f"a fault must be exactly one of {kinds}",
                remedy="write one list entry a fault, for example {kill: {rank: 1, step: 3}}",
            )
        return self

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {kind: point for kind, point in handler(self).items() if point is not None}

    def _given(self) -> dict[str, FaultPoint]:
        points = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: point for name, point in points.items() if point is not None}

    @property
    def kind(self) -> str:
        """What happens: the key in the job file."""
        (name,) = self._given()
        return _kind_of(name)

    @property
    def point(self) -> FaultPoint:
        """When it happens."""
        (point,) = self._given().values()
        return point


def _kind_of(field: str) -> str:
    return field.rstrip("_")  # `raise` is a word of Python's
