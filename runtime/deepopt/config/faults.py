"""Section `faults`: when a worker counts as lost, and how often the job may start again."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from deepopt.config.injection import FaultInjection
from deepopt.config_fields import Count, Index, Positive, Seconds, Section, refuse


class FaultsConfig(Section):
    """When a worker counts as lost, and how often the job may start again."""

    max_restarts: Index = Field(
        default=3,
        description="Generations that may be formed after lost workers, within `window_s`.",
    )
    max_host_losses: Index = Field(
        default=3,
        description="Generations that may be formed after lost hosts, within `window_s`.",
    )
    max_preemptions: Index = Field(
        default=20,
        description="Generations that may be formed after workers that were told to go (SIGTERM), "
        "within `window_s`.",
    )
    max_head_restarts: Index = Field(
        default=3, description="How often the head itself may be replaced, within `window_s`."
    )
    window_s: Seconds = Field(
        default=3600.0, description="How long a fault counts, in seconds."
    )
    bad_host_after: Count = Field(
        default=3,
        description="Faults within `window_s` after which a host is named as bad.",
    )
    heartbeat_s: Seconds = Field(
        default=0.5,
        description="Time between heartbeats, in seconds; three missing ones make a worker suspect.",
    )
    heartbeat_timeout_s: Seconds = Field(
        default=5.0,
        description="Silence after which a worker is lost although nobody can say why, in seconds; "
        "less when its host's agent sees it stopped or held, three times as much during set-up and "
        "first steps.",
    )
    step_timeout_s: Seconds = Field(
        default=600.0,
        description="Longest time without progress in any case, in seconds.",
    )
    hang_after_s: Seconds = Field(
        default=2.0,
        description="Shortest time inside one operation that counts as a hang, in seconds.",
    )
    hang_steps: Positive = Field(
        default=5.0,
        description="An operation hangs when it takes as long as this many of the longest recent "
        "steps; three times as many, and three times `hang_after_s`, while its process uses a CPU.",
    )
    on_preemption: Literal["stop", "go_on"] = Field(
        default="stop",
        description="What a SIGTERM to one worker does: `stop` the job with a checkpoint, or write one and "
        "`go_on` without that worker once it is gone.",
    )
    grace_s: Seconds = Field(
        default=25.0,
        description="Time from a SIGTERM (preemption) to the end, in seconds: a checkpoint is taken, or "
        "the workers are killed.",
    )
    lease_s: Seconds = Field(
        default=30.0,
        description="Time after which a host that the head cannot be reached from ends its workers "
        "by itself, in seconds.",
    )
    setup_timeout_s: Seconds = Field(
        default=180.0, description="Longest start of a worker group, in seconds."
    )
    spares: Index = Field(
        default=0,
        description="Processes that wait, with everything imported, to take a lost worker's place. On CPUs "
        "they have layers built, too: those of the whole model where that is no more memory than a worker "
        "takes in training (four times its weights), else none.",
    )
    shrink: Literal["auto", "never"] = Field(
        default="auto",
        description="When no device can be had for a lost worker's replacement: `auto` goes on with the "
        "workers that are left, by another plan, and takes places in again when they come back; "
        "`never` waits for a device until `setup_timeout_s`.",
    )
    min_workers: Count = Field(
        default=1, description="Fewest workers that the job goes on with after it has shrunk."
    )
    place_timeout_s: Seconds = Field(
        default=30.0,
        description="Longest wait for a device for a replacement, in seconds; then the job shrinks.",
    )
    grow_after_s: Seconds | None = Field(
        default=30.0,
        description="Shortest time between a change of the number of workers and growing again, in "
        "seconds, doubled with each shrink within `window_s`; null: it never grows by itself.",
    )
    replicas: Literal["auto", "peer", "none"] = Field(
        default="auto",
        description="Copies of layers in the memory of peers, made while training goes on: `auto` "
        "where a stage has no second holder, `peer` always, `none` never. Each worker then keeps two "
        "copies of its own weights and moments and two of a peer's, in host memory.",
    )
    replica_share: Annotated[float, Strict(), Field(gt=0, le=1)] = Field(
        default=0.02,
        description="Share of the time in which such copies may be made and sent; what was done since "
        "the last one is repeated after a fault.",
    )
    bad_step: Literal["fail", "skip", "recompute"] = Field(
        default="fail",
        description="When the loss or the gradient norm is not finite, or the norm above "
        "`faults.norm_limit`: end the job, leave the step's update out, or compute the step once more "
        "and end the job if it comes out bad again.",
    )
    norm_limit: Positive | None = Field(
        default=None,
        description="Largest global gradient norm before clipping that is not bad; null: any that is "
        "finite.",
    )
    survivor_timeout_s: Seconds = Field(
        default=10.0,
        description="Longest time, in seconds, that a healthy worker may take to leave its group when "
        "another is lost (the operation in work must end); then it is replaced as well.",
    )
    stop_grace_s: Seconds = Field(
        default=30.0,
        description="Time that a clean stop may take before workers are killed, in seconds.",
    )
    inject: tuple[FaultInjection, ...] = Field(
        default=(),
        description="Scripted faults for drills: `{KIND: {rank, step, op, generation}}`.",
    )

    @model_validator(mode="after")
    def _timeout_above_interval(self) -> Self:
        if self.heartbeat_timeout_s <= self.heartbeat_s:
            refuse(
                f"heartbeat timeout {self.heartbeat_timeout_s} s is not above "
                f"the time between heartbeats, {self.heartbeat_s} s",
                remedy="set faults.heartbeat_timeout_s to several times faults.heartbeat_s",
                fields=("heartbeat_timeout_s", "heartbeat_s"),
            )
        return self
