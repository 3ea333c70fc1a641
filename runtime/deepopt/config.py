"""The job: what a user may ask for, as frozen pydantic models with defaults that train at once.

Each field's description (with its unit) is the source of the JSON Schema, of the reference in
`docs/job-file.md` and of the file that `deepopt init` writes. What this module does not do:
read files and word errors (`deepopt.job_file` does), resolve `auto` (the planner does), import
what an import path names (`deepopt.import_path` does).
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, Strict, model_validator

from deepopt.config_fields import (
    Count,
    Figure,
    ImportPath,
    Index,
    MomentDecay,
    PerLayer,
    Positive,
    Seconds,
    Section,
    Text,
    refuse,
)
from deepopt.config_injection import FaultInjection

BUILT_AXES = ("pipeline", "data")
LATER_AXES = ("expert", "context", "tensor", "fsdp")


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
    def _groups_fit(self) -> Self:
        if self.groups is not None and self.groups > self.microbatches:
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


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Format of compute; weights and moments stay in float32 in either case.",
    )


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


class WorkerConfig(Section):
    """The processes that train."""

    count: Count | None = Field(
        default=None, description="Workers; null: one a GPU, or 4 where there is no GPU."
    )
    threads: Count = Field(
        default=1,
        description="CPU threads of a worker; 1 keeps the numbers independent of how many "
        "workers share the machine.",
    )
    device: Literal["auto", "cpu", "cuda", "emulated"] = Field(
        default="auto",
        description="Where tensors live; `auto`: cuda where there is a GPU; `emulated`: on the "
        "CPU, but each operation takes the time that `emulation` says.",
    )
    gpus: tuple[Text, ...] = Field(
        default=(),
        description="GPU of each rank on its host, as CUDA_VISIBLE_DEVICES names it (`0`, `GPU-...`); "
        "empty: as the cluster gives them out.",
    )


class EmulationConfig(Section):
    """What `worker.device: emulated` takes: a figure for all layers, or a list, one for each."""

    forward_ms: PerLayer = Field(
        default=20.0, description="Forward of a layer on one micro-batch, in milliseconds."
    )
    input_ms: PerLayer = Field(
        default=22.0, description="Gradient of a layer's input, in milliseconds."
    )
    weight_ms: PerLayer = Field(
        default=16.0, description="Gradient of a layer's weights, in milliseconds."
    )
    prepare_ms: PerLayer | None = Field(
        default=None,
        description="Repeating a layer's forward with `pipeline.recompute: full`, in "
        "milliseconds; null: as `forward_ms`.",
    )
    update_ms: PerLayer = Field(
        default=0.0,
        description="Optimizer update of a layer, once a step by each of its holders, in "
        "milliseconds; 0: as long as it really takes.",
    )
    rank_factor: tuple[Positive, ...] = Field(
        default=(),
        description="Multiplies the time of each rank of a pipeline: 1.6 is a device that is "
        "1.6 times slower; empty: all 1.",
    )
    latency_ms: Figure = Field(
        default=0.0,
        description="From the end of a transfer to its arrival, one way, in milliseconds.",
    )
    rate_gb_per_s: Positive | None = Field(
        default=None,
        description="Rate of a route between two ranks, in 10^9 bytes per second; null: no limit.",
    )
    output_mb: PerLayer = Field(
        default=0.0,
        description="What a layer hands on per micro-batch; its gradient has the same size, in "
        "10^6 bytes.",
    )
    gradient_mb: PerLayer = Field(
        default=0.0,
        description="Weight gradients of a layer, exchanged between its copies and replicas, in "
        "10^6 bytes.",
    )
    activation_mb: PerLayer = Field(
        default=0.0,
        description="What a layer holds for a micro-batch until its backward, in 10^6 bytes.",
    )
    state_mb: PerLayer = Field(
        default=0.0,
        description="Parameters, gradients and moments of a layer, per copy, in 10^6 bytes.",
    )
    memory_mb: tuple[Positive, ...] = Field(
        default=(),
        description="Memory of each rank of a pipeline, in 10^6 bytes; empty: enough.",
    )


class ClusterConfig(Section):
    """Where processes run; by default a private cluster on this machine."""

    address: Text | None = Field(
        default=None, description="Address of a running Ray cluster to join; null: start one."
    )
    hostfile: Text | None = Field(
        default=None, description="File of lines `host slots=N`; the hosts are reached by ssh."
    )
    start_timeout_s: Seconds = Field(
        default=120.0, description="Longest wait for the cluster to start, in seconds."
    )
    object_store_mb: Annotated[int, Strict(), Field(ge=75)] = Field(  # Ray's own minimum
        default=80, description="Shared memory of Ray's object store on each host, in MiB."
    )

    @model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if self.address is not None and self.hostfile is not None:
            refuse(
                f"cluster.address ({self.address}) and cluster.hostfile ({self.hostfile}) "
                "are both set",
                remedy="join a running cluster by its address, or start one over a hostfile",
                fields=("hostfile", "address"),
            )
        return self


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
        default=3.0,
        description="Shortest time inside one operation that counts as a hang, in seconds.",
    )
    hang_steps: Positive = Field(
        default=10.0,
        description="An operation hangs when it takes as long as this many of the longest recent "
        "steps.",
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
        description="Processes that wait, with everything imported, to take a lost worker's place.",
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


def _defaults_of(section: type[Section]) -> Any:
    return Field(default_factory=section, description=section.__doc__)


class JobConfig(Section):
    """One job: everything that decides what is trained, where, and how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(
        default="deepopt", description="Name of the job: letters, digits, `.`, `_` and `-`."
    )
    model: ModelConfig = _defaults_of(ModelConfig)
    data: DataConfig = _defaults_of(DataConfig)
    training: TrainingConfig = _defaults_of(TrainingConfig)
    optimizer: OptimizerConfig = _defaults_of(OptimizerConfig)
    pipeline: PipelineConfig = _defaults_of(PipelineConfig)
    elb: ElbConfig = _defaults_of(ElbConfig)
    parallel: ParallelConfig = _defaults_of(ParallelConfig)
    evaluation: EvaluationConfig = _defaults_of(EvaluationConfig)
    precision: PrecisionConfig = _defaults_of(PrecisionConfig)
    checkpoint: CheckpointConfig = _defaults_of(CheckpointConfig)
    logging: LoggingConfig = _defaults_of(LoggingConfig)
    worker: WorkerConfig = _defaults_of(WorkerConfig)
    emulation: EmulationConfig = _defaults_of(EmulationConfig)
    cluster: ClusterConfig = _defaults_of(ClusterConfig)
    faults: FaultsConfig = _defaults_of(FaultsConfig)
