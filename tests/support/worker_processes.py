"""Real workers in real processes over gloo, without Ray: the data plane on its own.

The caller plays the head: it hands out assignments, collects messages and may commit checkpoints.
"""

from __future__ import annotations

import argparse
import queue
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepopt.checkpoint.manifest import Manifest
from deepopt.checkpoint.store import CheckpointStore
from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.messages import (
    Assignment,
    ExpertLoads,
    Failure,
    RunEnded,
    Sender,
    ShardsWritten,
    StepReport,
    WeightWork,
    WorkerReady,
)
from deepopt.worker.rendezvous import serve_store
from deepopt.worker.stage_worker import StageWorker
from support.forking import fork_context

_TIMEOUT_S = 90.0


@dataclass
class Outcome:
    """What a group of workers said."""

    ready: dict[int, WorkerReady] = field(default_factory=dict)
    reports: list[StepReport] = field(default_factory=list)
    expert_loads: list[ExpertLoads] = field(default_factory=list)
    weight_work: dict[int, WeightWork] = field(default_factory=dict)
    shards: list[ShardsWritten] = field(default_factory=list)
    ended: dict[int, RunEnded] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]


TINY_MODEL = {
    "d_model": 32,
    "num_heads": 2,
    "num_blocks": 6,
    "num_experts": 4,
    "top_k": 2,
    "expert_hidden": 32,
    "dropout": 0.1,
    "router_noise": 0.1,
}


def tiny_job(**sections: Mapping[str, Any]) -> JobConfig:
    """The built-in model in small, with dropout, router noise, tied weights and active clipping."""
    fields: dict[str, Any] = {
        "model": {"kwargs": TINY_MODEL},
        "data": {"sequence_length": 32, "files": [argparse.__file__]},
        "training": {"microbatches": 8, "microbatch_size": 2, "grad_clip": 0.5},
        "optimizer": {"warmup_steps": 2},
        "logging": {"peak_flops": 1e9},
    }
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    return JobConfig.model_validate(fields)


def make_plan(
    job: JobConfig,
    *,
    placement: str = "line",
    schedule: str = "1f1b",
    boundaries: tuple[int, ...] = (0,),
    pipeline_size: int = 1,
    data_size: int = 1,
    num_groups: int = 2,
    order: tuple[int, ...] = (),
    recompute: tuple[int, ...] | None = None,
) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in describe(job).layers),
        boundaries=boundaries,
        placement=PlacementKind(placement),
        schedule=schedule,
        pipeline_size=pipeline_size,
        data_size=data_size,
        num_microbatches=job.training.microbatches,
        num_groups=num_groups,
        order=order,
        recompute=recompute,
    )


def train(
    job: JobConfig,
    plan: Plan,
    *,
    run_dir: Path,
    last_step: int,
    start_step: int = 0,
    checkpoint: Path | None = None,
    generation: int = 1,
) -> Outcome:
    """Run one generation to its end and return what its workers said, step reports in order."""
    store = serve_store("127.0.0.1")
    context = fork_context()
    messages: Any = context.Queue()
    processes = []
    for rank in range(plan.world_size):
        assignment = Assignment(
            sender=Sender(
                job_id="test",
                generation=generation,
                plan_id=plan.plan_id,
                rank=rank,
                incarnation=uuid.uuid4().hex,
            ),
            store_host=store.host,
            store_port=store.port,
            job=job,
            plan=plan,
            run_dir=str(run_dir),
            checkpoint=None if checkpoint is None else str(checkpoint),
            start_step=start_step,
            last_step=last_step,
        )
        process = context.Process(target=_work, args=(assignment, messages), daemon=True)
        process.start()
        processes.append(process)
    outcome = Outcome()
    try:
        while len(outcome.ended) + len(outcome.failures) < plan.world_size:
            _take(outcome, messages.get(timeout=_TIMEOUT_S))
            if any(failure.kind != "peer" for failure in outcome.failures.values()):
                break  # the head would kill the others now
    except queue.Empty:
        raise AssertionError(f"workers said nothing for {_TIMEOUT_S} s: {outcome}") from None
    finally:
        for process in processes:
            if outcome.failures:
                process.kill()
            process.join()
    outcome.reports.sort(key=lambda report: report.step)
    return outcome


def losses_of(job: JobConfig, plan: Plan, *, run_dir: Path, last_step: int) -> list[float]:
    """Losses of a run from the start; a worker's failure fails the test with its traceback."""
    outcome = train(job, plan, run_dir=run_dir, last_step=last_step)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    return outcome.losses


def _take(outcome: Outcome, message: object) -> None:
    if isinstance(message, WorkerReady):
        outcome.ready[message.sender.rank] = message
    elif isinstance(message, StepReport):
        outcome.reports.append(message)
    elif isinstance(message, ExpertLoads):
        outcome.expert_loads.append(message)
    elif isinstance(message, WeightWork):
        outcome.weight_work[message.sender.rank] = message
    elif isinstance(message, ShardsWritten):
        outcome.shards.append(message)
    elif isinstance(message, RunEnded):
        outcome.ended[message.sender.rank] = message
    elif isinstance(message, Failure):
        outcome.failures[message.sender.rank] = message
    else:
        raise AssertionError(message)


def _work(assignment: Assignment, messages: Any) -> None:
    worker = StageWorker(assignment, report=messages.put)
    try:
        messages.put(worker.setup())
        ended = worker.run()
        worker.close()
        messages.put(ended)
    except Exception as error:  # noqa: BLE001 - the process's edge
        traceback.print_exc()
        messages.put(worker.describe_failure(error))


def commit(outcome: Outcome, job: JobConfig, plan: Plan, *, run_dir: Path) -> Path:
    """Commit the last checkpoint of a group that ended well, as the head would."""
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    step = max(written.step for written in outcome.shards)
    sender = outcome.shards[0].sender
    manifest = Manifest(
        job_id=sender.job_id,
        step=step,
        generation=sender.generation,
        plan=plan.to_json(),
        plan_fingerprint=plan.fingerprint(),
        skeleton_fingerprint=describe(job).fingerprint(),
        seed=job.training.seed,
        num_groups=plan.num_groups,
        tokens_seen=None,
        data_fingerprint=None,
        data_state=None,
        created_at="",
        shards=tuple(s for w in outcome.shards if w.step == step for s in w.shards),
    )
    return CheckpointStore(run_dir / "checkpoints").commit(manifest)
