"""What head and workers say to each other: plain, frozen, picklable data without tensors.

Every message from a worker carries its `Sender`; the head refuses one of another generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepopt.checkpoint.manifest import ShardEntry
from deepopt.config import JobConfig
from deepopt.pipeline.emulated_clock import Overruns
from deepopt.pipeline.weight_ways import Verdict, WaysByConditions
from deepopt.planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """Who speaks: the fencing fields of every message.

    Args:
        job_id: the job.
        generation: worker group the speaker belongs to.
        plan_id: plan it works by.
        rank: its rank in the world of that generation.
        incarnation: uuid of its process.
    """

    job_id: str
    generation: int
    plan_id: int
    rank: int
    incarnation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a worker still has when its group has ended; its process can join the next one.

    Args:
        version: steps whose update its layers have.
        ready: whether the gradients of the step after are whole, so that it can make its update
            as soon as it is told that step's exchange.
        layers: names of the layers that it has; empty before it was set up.
        replicas: step -> names of layers of others that it keeps a copy of as after that step.
        held: earlier steps that it can take its own layers back to.
    """

    version: int
    ready: bool
    layers: tuple[str, ...]
    replicas: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """A layer's state that goes from one worker of the new group to another.

    Args:
        layer: its name.
        source: rank that has it.
        target: rank that needs it.
        replica: whether the source has it as a copy kept for another.
    """

    layer: str
    source: int
    target: int
    replica: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InPlace:
    """How a group goes on without going back to a checkpoint.

    Args:
        previous_generation: whose workers told the exchange of the last step, if it is needed.
        transfers: states that go to who does not have them, in this order.
        report: whether rank 0 shall report the step that the group starts after: nobody did.
        save: whether that step's checkpoint is due and not there.
    """

    previous_generation: int
    transfers: tuple[Transfer, ...] = ()
    report: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the head tells a worker before it sets up.

    Args:
        sender: the identity the worker must use in its messages.
        store_host: IP address of the TCPStore in the head.
        store_port: its port.
        job: the resolved job.
        plan: who holds which layers.
        run_dir: the run directory; the same path on every host.
        checkpoint: folder of the committed checkpoint to load; None: initialise from the seed.
            With `in_place` it only says where a stream of data may begin.
        start_step: steps already done (0 for a new job); the first step run is start_step + 1.
        last_step: run through this step.
        node_ip: IP address of the worker's own host, for the transport.
        in_place: how the group goes on from what its workers have; None: from the checkpoint.
        known_ways: how weight gradients are computed, as far as workers have found it out.
    """

    sender: Sender
    store_host: str
    store_port: int
    job: JobConfig
    plan: Plan
    run_dir: str
    checkpoint: str | None
    start_step: int
    last_step: int
    node_ip: str = "127.0.0.1"
    in_place: InPlace | None = None
    known_ways: WaysByConditions = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """A worker has its layers and its process groups.

    Args:
        pid: process id on its host.
        host: host name.
        stages: stages it holds.
        device: for example `cpu` or `cuda:0`.
        setup_s: seconds by part (`import`, `rendezvous`, `build`, `load`).
        peak_flops: the device's peak in FLOP/s; 0 when unknown.
        peak_source: `job`, `table` or `measured`.
        data_fingerprint: hash of the data source; None where no batch is needed.
    """

    sender: Sender
    pid: int
    host: str
    stages: tuple[int, ...]
    device: str
    setup_s: Mapping[str, float]
    peak_flops: float
    peak_source: str
    data_fingerprint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTimes:
    """Where one worker's step went, in seconds.

    Args:
        rank: the worker.
        step_s: from the first action to the end of the update.
        compute_s: inside forward and backward.
        wait_s: waiting for a receive.
        send_s: posting sends.
        reduce_s: summing gradients over copies and replicas.
        update_s: norm exchange, clipping and optimizer.
    """

    rank: int
    step_s: float
    compute_s: float
    wait_s: float
    send_s: float
    reduce_s: float
    update_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One finished step; rank 0 alone sends it.

    Args:
        step: 1-based.
        loss: mean over the step's micro-batches, full precision.
        grad_norm: global norm before clipping.
        learning_rate: used in this step.
        tokens: tokens trained on in this step, all replicas.
        step_time_s: wall time of the step on rank 0.
        workers: times of every worker.
        scalars: further figures for the metrics, by name.
    """

    sender: Sender
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    step_time_s: float
    workers: tuple[WorkerTimes, ...]
    scalars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightWork:
    """How a worker's weight gradients are computed where they may wait for W; once, after its
    first step.

    Args:
        notes: a line for each layer where they do not all simply wait: which way, for which
            weights, why.
        conditions: what the trial depended on but for the layers' code: device, versions, inputs.
        ways: of all layers, by name: whoever takes the worker's place need not try again.
    """

    sender: Sender
    notes: tuple[str, ...]
    conditions: str = ""
    ways: Mapping[str, Verdict] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadStep:
    """The numbers of a step were bad and the job goes on; rank 0 alone sends it.

    Args:
        step: the step.
        what: the values, in words.
        skipped: whether its update was left out; else computing it again came out good.
    """

    sender: Sender
    step: int
    what: str
    skipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoads:
    """Tokens that each expert of some layers got; from the first holder of each layer.

    Args:
        first_step: of the window.
        step: the last of the window; each of the first `elb.monitor_freq` steps is one.
        loads: (layer, tokens of each expert) of each router, in the order of the layers.
    """

    sender: Sender
    first_step: int
    step: int
    loads: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsWritten:
    """A worker's part of a checkpoint is on disk and fsynced.

    Args:
        step: step of the checkpoint.
        shards: what it wrote.
        data_state: state of a stream source, from rank 0 only; None for indexed sources.
    """

    sender: Sender
    step: int
    shards: tuple[ShardEntry, ...]
    data_state: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed:
    """A worker could not write its part; training goes on.

    Args:
        step: step of the checkpoint.
        reason: one line: file, error.
    """

    sender: Sender
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sign of life, from a thread apart from training.

    Args:
        step: step in work.
        progress: counter that grows with every action; stands still in a hang.
        action: action in work, for example `2F5`; empty between steps.
        action_s: how long it has been in work, in seconds; 0 between actions.
        evaluation: of the evaluation in work, micro-batches whose last forward has begun on this
            worker, and how many there are on all workers; None between evaluations.
    """

    sender: Sender
    step: int
    progress: int
    action: str
    action_s: float = 0.0
    evaluation: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a worker's run ended badly; returned by the worker, or made by the head for a dead
    one.

    Args:
        kind: `error` (its own), `peer` (a victim: a peer or link failed), `death` (process
            gone), `hang` (no sign of life or of progress), `setup` (before the first step),
            `device` (its device is gone or broken).
        step: step in work; 0 before the first.
        action: action in work, with stage, op and micro-batch; empty when between actions.
        message: one line.
        traceback: text; empty when there is none.
        exit_code: exit code of the error class when `kind` is error.
        remedy: next step, when the error named one.
        pid: process id.
        host: host name.
        cause: why a worker that cannot speak counts as lost, one of `head.liveness.Cause`; empty
            in a worker's own words.
        standing: what a victim still has; None where the process cannot go on.
    """

    sender: Sender
    kind: str
    step: int
    action: str
    message: str
    traceback: str = ""
    exit_code: int = 5
    remedy: str = ""
    pid: int = 0
    host: str = ""
    cause: str = ""
    standing: Standing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """A worker's process got SIGTERM: its host will soon be taken away."""

    sender: Sender


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """A worker's run ended as asked.

    Args:
        step: the last step whose update was applied.
        reason: `finished` (last_step reached), `stopped` or `left` (the group; asked to).
        op_times_s: median seconds by `STAGE OP`, for example `2F`, measured on this worker.
        overruns: of this worker's emulated device; None where the device is real.
        parts_s: seconds of a step by part, see `worker.step_parts`.
        standing: what it has, for the case that another one cannot end so.
    """

    sender: Sender
    step: int
    reason: str
    op_times_s: Mapping[str, float] = field(default_factory=dict)
    overruns: Overruns | None = None
    parts_s: Mapping[str, float] = field(default_factory=dict)
    standing: Standing | None = None
