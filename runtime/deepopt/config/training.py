"""Sections `training`, `optimizer` and `precision`: what decides the numbers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, Strict, model_validator

from deepopt.config_fields import (
    Count,
    ImportPath,
    Index,
    MomentDecay,
    Positive,
    Section,
    Text,
    refuse,
)


class TrainingConfig(Section):
    """How much is trained, and in which portions."""

    steps: Count = Field(default=60, description="Optimizer steps; only says where to stop.")
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of weights, data order, dropout and router noise."
    )
    microbatches: Count = Field(
        default=8, description="Micro-batches of one step, over all replicas of the pipeline."
    )
    microbatch_size: Count = Field(default=4, description="Sequences of one micro-batch.")
    batch_size: Count | None = Field(
        default=None,
        description="Sequences of one step, over all replicas, instead of the two keys above: the "
        "first launch or profile tries into how many micro-batches to cut them, and the job has those "
        "two keys from then on. null: microbatches x microbatch_size.",
    )
    groups: Count | None = Field(
        default=None,
        description="Gradient groups of one step: gradients add inside a group, then the "
        "groups in order, so this alone decides the rounding. A multiple of replicas x mirror "
        "copies. "
        "null: min(2, microbatches). Fixed at the first launch.",
    )
    grad_clip: Positive | None = Field(
        default=1.0, description="Largest global L2 norm of the gradients; null: no clipping."
    )

    @model_validator(mode="after")
    def _batch_is_said_once(self) -> Self:
        said = {"microbatches", "microbatch_size"} & self.model_fields_set
        if self.batch_size is not None and said:
            refuse(
                f"batch_size {self.batch_size} with {' and '.join(sorted(said))}: one follows from "
                "the other",
                remedy="leave out training.batch_size, or the others",
                fields=("batch_size", *sorted(said)),
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if (
            self.batch_size is None
            and self.groups is not None
            and self.groups > self.microbatches
        ):
            refuse(
                f"{self.groups} gradient groups for {self.microbatches} micro-batches",
                remedy=f"set training.groups between 1 and {self.microbatches}",
                fields=("groups", "microbatches"),
            )
        return self


class OptimizerConfig(Section):
    """The update."""

    name: Literal["adamw"] = Field(
        default="adamw", description="The optimizer, where `factory` names no other."
    )
    factory: ImportPath | None = Field(
        default=None,
        description="Import path of any other optimizer: a class such as `torch.optim:SGD`, or a function "
        "of a layer's (name, parameter) pairs. It is called once for each layer, over float32 masters; "
        "the other keys here but `scheduler` are then without effect.",
    )
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Keyword arguments for `optimizer.factory`."
    )
    scheduler: ImportPath | None = Field(
        default=None,
        description="Import path of a schedule of learning rates for `optimizer.factory`, such as "
        "`torch.optim.lr_scheduler:CosineAnnealingLR`: called with the optimizer, stepped once a step.",
    )
    scheduler_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Keyword arguments for `optimizer.scheduler`."
    )
    learning_rate: Annotated[float, Strict(), Field(ge=0)] = Field(
        default=3e-3, description="Peak learning rate."
    )
    betas: tuple[MomentDecay, MomentDecay] = Field(
        default=(0.9, 0.95), description="Decay of the first and second moment, each in [0, 1)."
    )
    eps: Positive = Field(default=1e-8, description="Added to the root of the second moment.")
    weight_decay: Annotated[float, Strict(), Field(ge=0)] = Field(
        default=0.1, description="Decoupled decay; parameters with two or more dimensions only."
    )
    warmup_steps: Index = Field(default=10, description="Steps of linear warm-up.")
    decay_steps: Count | None = Field(
        default=None,
        description="The step at which the cosine after the warm-up ends, counted from step 1; "
        "null: constant after the warm-up. Independent of training.steps.",
    )
    min_ratio: Annotated[float, Strict(), Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Learning rate after the cosine, as a share of the peak.",
    )

    @model_validator(mode="after")
    def _one_optimizer(self) -> Self:
        for name, needed in (
            ("kwargs", "factory"),
            ("scheduler", "factory"),
            ("scheduler_kwargs", "scheduler"),
        ):
            if getattr(self, name) and getattr(self, needed) is None:
                refuse(
                    f"optimizer.{name} is set without optimizer.{needed}",
                    remedy=f"name it in optimizer.{needed}, for example torch.optim:SGD"
                    if needed == "factory"
                    else "name it in optimizer.scheduler",
                    fields=(name,),
                )
        return self

    @model_validator(mode="after")
    def _decay_after_warmup(self) -> Self:
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            refuse(
                f"decay ends at step {self.decay_steps}, "
                f"not after the warm-up of {self.warmup_steps} steps",
                remedy=f"set optimizer.decay_steps above {self.warmup_steps}, "
                "or lower optimizer.warmup_steps",
                fields=("decay_steps", "warmup_steps"),
            )
        return self


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Format of compute; weights and moments stay in float32 in either case.",
    )
    fp8: Literal["none", "blockwise"] = Field(
        default="none",
        description="`blockwise`: linear maps compute their three products in FP8 (E4M3), with a scale each "
        "1 x 128 values of activations and gradients and each 128 x 128 of weights (docs/fp8.md); the rest "
        "in `dtype`.",
    )
    fp8_include: tuple[Text, ...] | None = Field(
        default=None,
        description="Patterns (`*`, `?`) of the linear maps that do, or of modules that hold them; null: "
        "those in repeated blocks, without routers and sides shorter than 128.",
    )
    fp8_exclude: tuple[Text, ...] = Field(
        default=(), description="Patterns of the linear maps that stay in `dtype`."
    )

    @model_validator(mode="after")
    def _patterns_for_fp8(self) -> Self:
        if self.fp8 == "none" and (self.fp8_include is not None or self.fp8_exclude):
            refuse(
                "patterns for FP8, and precision.fp8 is none",
                remedy="set precision.fp8 to blockwise, or leave the patterns out",
                fields=("fp8_include", "fp8_exclude"),
            )
        return self
