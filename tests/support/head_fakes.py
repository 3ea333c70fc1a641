"""A worker group, a clock and an executor for tests of the head: no process, no thread, no time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.store import CheckpointStore
from deepopt.cluster.group import ExportEnded, WorkerGone, WorkerUp
from deepopt.cluster.node_agent import AgentWord, ProcessEnded
from deepopt.cluster.process_look import ProcessLook
from deepopt.config import JobConfig
from deepopt.errors import ClusterError
from deepopt.head.board import Board
from deepopt.head.controller import Controller
from deepopt.head.journal import Journal, replay
from deepopt.head.record import JobRecord
from deepopt.head.status import Identity
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.schedule.ir import PlacementKind
from deepopt.telemetry.files import read_json, read_json_lines
from deepopt.worker.messages import (
    Assignment,
    CheckpointFailed,
    Failure,
    Heartbeat,
    Preempted,
    RunEnded,
    Sender,
    ShardsWritten,
    StepReport,
    WorkerReady,
    WorkerTimes,
)

LAYERS = ("embed", "blocks.0", "blocks.1", "head")


class FakeClock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


class InlineExecutor(Executor):
    """Runs at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - what a real executor does
            future.set_exception(error)
        return future


@dataclass
class FakeGroup:
    """Notes what it is asked."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    immortal: bool = False
    watched: list[int] = field(default_factory=list)
    spares: int = 0
    warm_spares: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    sought: tuple[int, ...] = ()

    def prepare(
        self, generation: int, *, places: Sequence[int], kept: Mapping[int, int] | None = None
    ) -> None:
        self.calls.append(("prepare", generation, len(places)))
        self.places = tuple(places)
        self.kept = dict(kept or {})

    def keep_spares(self, count: int) -> None:
        self.spares = count

    def interrupt(self) -> None:
        self.calls.append(("interrupt",))

    def launch(self, assignments: Sequence[Assignment]) -> None:
        self.assignments = list(assignments)
        self.calls.append(("launch", assignments[0].sender.generation))

    def request_stop(self) -> None:
        self.calls.append(("stop",))

    def seek(self, places: Collection[int]) -> None:
        self.sought = tuple(sorted(places))

    def request_leave(self) -> None:
        self.calls.append(("leave",))

    def request_checkpoint(self) -> None:
        self.calls.append(("checkpoint",))

    def export(self, rank: int, *, checkpoint: str) -> None:
        self.calls.append(("export", rank, Path(checkpoint).name))

    def kill(self, rank: int) -> None:
        self.calls.append(("kill", rank))

    def watch(self, rank: int) -> None:
        self.watched.append(rank)

    def renew_agent(self, host: str) -> None:
        self.calls.append(("renew_agent", host))

    def confirm_exit(self, rank: int, *, how: str) -> None:
        self.calls.append(("confirm_exit", rank, how))

    def kill_all(self, *, timeout_s: float, but: Collection[int] = ()) -> None:
        self.calls.append(("kill_all", *sorted(but)))
        if self.immortal:
            raise ClusterError("rank 1 does not die")


def make_plan(
    *, num_groups: int = 2, pipeline_size: int = 2, layers: Sequence[str] = LAYERS
) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=tuple(layers),
        boundaries=tuple(len(layers) * s // pipeline_size for s in range(pipeline_size)),
        placement=PlacementKind.LINE,
        schedule="1f1b",
        pipeline_size=pipeline_size,
        data_size=1,
        num_microbatches=4,
        num_groups=num_groups,
    )


def make_skeleton(layers: Sequence[str] = LAYERS) -> ModelSkeleton:
    return ModelSkeleton(
        factory="tests:model",
        kwargs={},
        layers=tuple(
            LayerSkeleton(
                name=name,
                kind="Linear",
                parameters=(
                    ParameterSkeleton(name=f"{name}.weight", shape=(4,), dtype="float32"),
                ),
                forward_flops_per_token=8.0,
            )
            for name in layers
        ),
    )


class HeadUnderTest:
    """A controller with fakes around it, and the words that workers would say to it."""

    def __init__(self, root: Path, *, job: JobConfig, plan: Plan | None = None) -> None:
        self.run = RunDirectory(root)
        root.mkdir(parents=True, exist_ok=True)
        self.job = job
        self.plan = plan or make_plan()
        self.clock = FakeClock()
        self.group = FakeGroup()
        self.store = CheckpointStore(self.run.checkpoints, keep=job.checkpoint.keep)
        self.journal = Journal(self.run.journal)
        self.board = Board(self.run, tensorboard=False)
        history = replay(self.journal.entries)
        launches = sum(entry.kind == "job" for entry in self.journal.entries)
        numbers = itertools.count()
        self.reports: list[JobRecord] = []
        self.controller = Controller(
            run=self.run,
            job=job,
            skeleton=make_skeleton(),
            plan=self.plan,
            identity=Identity(
                job_id=history.job_id or "job-1",
                name="test",
                last_step=job.training.steps,
                supervisor_pid=4321,
            ),
            group=self.group,
            store=self.store,
            store_address=("127.0.0.1", 29999),
            journal=self.journal,
            board=self.board,
            executor=InlineExecutor(),
            clock=self.clock,
            make_report=self._report,
            new_incarnation=lambda: f"{launches}-{next(numbers)}",
        )

    def _report(self, record: JobRecord) -> dict[str, Any]:
        self.reports.append(record)
        return {"state": str(record.state)}

    def close(self) -> None:
        self.board.close()
        self.journal.close()

    # --- what workers say ----------------------------------------------------------------

    def sender(self, rank: int) -> Sender:
        return self.group.assignments[rank].sender

    def start(self) -> HeadUnderTest:
        self.controller.start()
        return self

    def ready(
        self, *, data: Sequence[str] = ("text", "text"), load_s: float = 0.0
    ) -> HeadUnderTest:
        for assignment in self.group.assignments:
            rank, generation = assignment.sender.rank, assignment.sender.generation
            self.controller.handle(
                WorkerUp(generation=generation, rank=rank, pid=100 + rank, host="alpha")
            )
            self.beat(rank, step=assignment.start_step)
            self.controller.handle(
                WorkerReady(
                    sender=assignment.sender,
                    pid=100 + rank,
                    host="alpha",
                    stages=(rank,),
                    device="cpu",
                    setup_s={"build": 0.5, "load": load_s},
                    peak_flops=1e6,
                    peak_source="job",
                    data_fingerprint=data[rank],
                )
            )
        return self

    def beat(
        self,
        rank: int,
        *,
        step: int,
        progress: int = 0,
        action: str = "",
        evaluation: tuple[int, int] | None = None,
    ) -> None:
        self.controller.handle(
            Heartbeat(
                sender=self.sender(rank),
                step=step,
                progress=progress,
                action=action,
                evaluation=evaluation,
            )
        )

    def step(self, step: int, *, loss: float = 2.5) -> None:
        self.controller.handle(
            StepReport(
                sender=self.sender(0),
                step=step,
                loss=loss,
                grad_norm=1.0,
                learning_rate=1e-3,
                tokens=1000,
                step_time_s=0.5,
                workers=tuple(
                    WorkerTimes(
                        rank=rank,
                        step_s=0.5,
                        compute_s=0.25,
                        wait_s=0.2,
                        send_s=0.01,
                        reduce_s=0.02,
                        update_s=0.02,
                    )
                    for rank in range(self.plan.world_size)
                ),
            )
        )

    def steps(self, first: int, last: int) -> HeadUnderTest:
        for step in range(first, last + 1):
            self.step(step)
        return self

    def write_shards(self, step: int, rank: int) -> None:
        sender = self.sender(rank)
        self.store.begin(step, sender.generation)
        shards = tuple(
            self.store.write_layer(
                step,
                sender.generation,
                LayerState(
                    layer=name,
                    tensors={f"parameter/{name}.weight": torch.full((4,), float(step))},
                ),
                rank,
            )
            for stage in self.plan.held_stages(rank)
            for name in (self.plan.layer_names[i] for i in self.plan.stage_layers(stage))
        )
        self.controller.handle(ShardsWritten(sender=sender, step=step, shards=shards))

    def checkpoint(self, step: int) -> HeadUnderTest:
        for rank in range(self.plan.world_size):
            self.write_shards(step, rank)
        self.controller.tick()
        return self

    def checkpoint_fails(self, step: int, rank: int, reason: str) -> None:
        self.controller.handle(
            CheckpointFailed(sender=self.sender(rank), step=step, reason=reason)
        )

    def end(self, step: int, reason: str = "finished") -> HeadUnderTest:
        for rank in range(self.plan.world_size):
            self.controller.handle(RunEnded(sender=self.sender(rank), step=step, reason=reason))
        self.controller.tick()
        return self

    def exported(self, folder: str | None = "final", reason: str = "") -> None:
        self.controller.handle(
            ExportEnded(generation=self.sender(0).generation, folder=folder, reason=reason)
        )

    def fails(self, rank: int, kind: str = "error", **fields: Any) -> None:
        words: dict[str, Any] = {"step": 3, "action": "1F2", "message": f"{kind} of {rank}"}
        self.controller.handle(
            Failure(sender=self.sender(rank), kind=kind, **{**words, **fields})
        )

    def dies(self, rank: int, reason: str = "killed by SIGKILL") -> None:
        self.controller.handle(
            WorkerGone(generation=self.sender(rank).generation, rank=rank, reason=reason)
        )

    def preempted(self, rank: int) -> None:
        self.controller.handle(Preempted(sender=self.sender(rank)))

    def exits(self, rank: int, how: str) -> None:
        """The agent of the host tells of a worker's end."""
        self.controller.handle(ProcessEnded(host="alpha", pid=100 + rank, how=how))

    def agent(self, *, looks: Mapping[int, ProcessLook]) -> None:
        """The agent of the host tells what it sees."""
        by_pid = {100 + rank: look for rank, look in looks.items()}
        self.controller.handle(AgentWord(host="alpha", looks=by_pid))

    def wait(self, duration_s: float, *, beating: Sequence[int] = ()) -> None:
        """Let time go by in steps of a quarter of a second, with ticks and heartbeats."""
        for _ in range(round(duration_s / 0.25)):
            self.clock.now_s += 0.25
            for rank in beating:
                self.beat(rank, step=3)
            self.controller.tick()

    # --- what people see -----------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.run.status)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_json_lines(self.run.events) if line["kind"] == kind]

    def metrics(self) -> list[dict[str, Any]]:
        return read_json_lines(self.run.metrics)

    def journaled(self) -> list[str]:
        return [
            f"{entry.kind}:{entry.fields['state']}" if entry.kind == "state" else entry.kind
            for entry in self.journal.entries
        ]
