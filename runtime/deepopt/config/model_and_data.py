"""Sections `model`, `data` and `evaluation`: what is trained, on what, and what it is tested on."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, JsonValue, Strict, model_validator

from deepopt.config_fields import Count, ImportPath, Index, Section, Text, refuse


class ModelConfig(Section):
    """What is trained."""

    factory: ImportPath = Field(
        default="deepopt.models.moe_transformer:build",
        description="Import path `package.module:callable` of what returns the model.",
    )
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Keyword arguments for the factory."
    )
    loss: ImportPath | None = Field(
        default=None,
        description="Import path of `loss(output, targets) -> scalar mean`; "
        "null: the model's own `loss`.",
    )
    loss_kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Further keyword arguments for `model.loss`."
    )

    @model_validator(mode="after")
    def _arguments_for_a_loss(self) -> Self:
        if self.loss_kwargs and self.loss is None:
            refuse(
                f"model.loss_kwargs ({', '.join(self.loss_kwargs)}) is set without model.loss",
                remedy="name the function that takes them in model.loss",
                fields=("loss_kwargs",),
            )
        return self


class DataConfig(Section):
    """What it is trained on."""

    dataset: ImportPath | None = Field(
        default=None,
        description="Import path `package.module:dataset` of a factory of batches; "
        "null: text from `data.files`.",
    )
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Keyword arguments for the dataset factory."
    )
    files: tuple[Text, ...] = Field(
        default=(),
        description="Text files and globs (`**` too); "
        "empty: the Python standard library's own sources.",
    )
    tokenizer: Text = Field(
        default="bytes",
        description="`bytes`, or the name or path of a Hugging Face tokenizer (extra `[hf]`).",
    )
    sequence_length: Count = Field(default=128, description="Length of a sequence, in tokens.")
    readers: Index = Field(
        default=0,
        description="Processes that read micro-batches ahead, of each worker that holds the first or the "
        "last layers; 0: the worker reads when it needs one. Not for streams. The `num_workers` of a "
        "`DataLoader` that `DeepTrainer` is given.",
    )
    prefetch: Count = Field(
        default=2, description="Micro-batches that each reader has in work or ready."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.files:
            refuse(
                f"data.dataset ({self.dataset}) and data.files are both set",
                remedy="set one of them; a dataset factory takes paths by data.kwargs",
                fields=("files", "dataset"),
            )
        if self.kwargs and self.dataset is None:
            refuse(
                f"data.kwargs ({', '.join(self.kwargs)}) is set without data.dataset",
                remedy="name the factory that takes them in data.dataset",
                fields=("kwargs",),
            )
        return self


class EvaluationConfig(Section):
    """A validation set: forwards through the same pipeline, in eval mode."""

    files: tuple[Text, ...] = Field(
        default=(),
        description="Text files and globs of the validation set, read as `data.files` are.",
    )
    dataset: ImportPath | None = Field(
        default=None,
        description="Import path of a dataset factory, as `data.dataset`; not of a stream. "
        "Neither this nor `files`: no validation.",
    )
    kwargs: dict[str, JsonValue] = Field(
        default_factory=dict, description="Keyword arguments for the dataset factory."
    )
    every: Index = Field(
        default=0, description="Steps between evaluations; 0: only after the last step."
    )
    microbatches: Count | None = Field(
        default=None,
        description="Micro-batches to evaluate at most, each of `training.microbatch_size`; null: "
        "all whole ones that the data has.",
    )
    readers: Index = Field(
        default=0,
        description="Processes that read the validation set ahead, as `data.readers`.",
    )
    alone: Annotated[bool, Strict()] = Field(
        default=False,
        description="Only evaluate: no step is trained, nothing is saved. `DeepTrainer.evaluate` sets it.",
    )

    outputs: Annotated[bool, Strict()] = Field(
        default=False,
        description="With `alone`: write the model's outputs into the run directory instead of computing "
        "losses. `DeepTrainer.predict` sets it.",
    )

    @property
    def is_wanted(self) -> bool:
        """Whether there is a validation set."""
        return bool(self.files) or self.dataset is not None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.files:
            refuse(
                f"evaluation.dataset ({self.dataset}) and evaluation.files are both set",
                remedy="set one of them",
                fields=("files", "dataset"),
            )
        if self.outputs and not self.alone:
            refuse(
                "evaluation.outputs is set, and evaluation.alone is not",
                remedy="set both: outputs are written by jobs that do nothing else",
                fields=("outputs",),
            )
        if not self.is_wanted and (
            self.every or self.kwargs or self.microbatches or self.alone
        ):
            refuse(
                "evaluation has neither files nor a dataset",
                remedy="name the validation set in evaluation.files or evaluation.dataset",
                fields=("every", "kwargs", "microbatches"),
            )
        return self
