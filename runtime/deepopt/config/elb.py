"""Section `elb`: how experts are kept equally busy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from deepopt.config_fields import Count, Figure, Positive, Section


class ElbConfig(Section):
    """Expert load balancing (docs/elb.md); of no effect on models without experts."""

    mode: Literal["elb", "formula", "sign", "quantile", "aux", "none"] = Field(
        default="elb",
        description="What keeps experts equally busy: `elb` (each expert's score distribution is "
        "tracked, with feedback inside the step), `formula` (p' = p (1 + alpha x deficit / mean load), "
        "every `monitor_freq` steps), `sign` (a fixed step per update, as in DeepSeek-V3), `quantile` (the "
        "last step's quantile), `aux` (a loss), `none`.",
    )
    replace_routers: Annotated[bool, Strict()] = Field(
        default=False,
        description="Also route the mixtures of experts of models that nobody wrote for deepopt (Mixtral, "
        "Qwen-MoE, DeepSeek-V3 of `transformers`); `elb_config` of `DeepTrainer` and "
        "`convert_to_deepopt` sets it.",
    )
    alpha: Annotated[float, Strict(), Field(gt=0, le=1)] = Field(
        default=0.3,
        description="Gain of 1 + alpha x (mean load - load) / mean load, in (0, 1]: inside the step in "
        "mode `elb`, between steps in mode `formula`.",
    )
    monitor_freq: Count = Field(
        default=100,
        description="Steps of one window: of the update in mode `formula`, and of reported loads.",
    )
    level: Literal["device", "expert"] = Field(
        default="device",
        description="What the feedback inside the step of mode `elb` keeps even: the devices' loads "
        "(nothing to do where `devices` is 1), or each expert's.",
    )
    devices: Count | None = Field(
        default=None,
        description="Devices that share the experts of a layer in equal blocks; null: "
        "`parallel.expert`.",
    )
    chunks: Count = Field(
        default=16,
        description="Position chunks of a sequence for the feedback inside the step; 1: none.",
    )
    decay: Annotated[float, Strict(), Field(ge=0, lt=1)] = Field(
        default=0.7,
        description="Share of the tracked score distribution that stays at each step, in [0, 1).",
    )
    sign_rate: Positive = Field(
        default=0.001, description="Step of the bias in mode `sign`, in units of the score."
    )
    aux_coefficient: Figure = Field(
        default=0.01,
        description="Weight of the balance loss in mode `aux`; of no effect in others.",
    )
    sequence_coefficient: Figure = Field(
        default=0.0,
        description="Weight of a balance loss within each sequence, beside any mode; 0: none.",
    )
    z_coefficient: Figure = Field(
        default=0.0,
        description="Weight of the squared log-sum-exp of the router's logits; 0: none.",
    )
    warmup: Annotated[bool, Strict()] = Field(
        default=True,
        description="In step 1 each micro-batch first solves for the bias that balances itself "
        "(modes `elb` and `quantile`). In mode `elb`, while scores move too much from step to step for "
        "a bias of the step before, at most for the first window, the feedback inside the step is at "
        "the level of experts.",
    )
    target_share: Annotated[float, Strict(), Field(ge=0, le=1)] = Field(
        default=0.0,
        description="Aim at each expert's natural share (without bias) to this power: 0 is uniform, 1 "
        "leaves loads as they are (modes `elb` and `quantile`).",
    )
    compensate: Annotated[bool, Strict()] = Field(
        default=False,
        description="Shrink the gradients of experts with more than 1.25 times the mean load whose "
        "norm is more than twice the median of all experts'.",
    )
