"""`StageWorker`: what one worker does, as a plain class: set up, train from step to step,
report.

It holds its stages from one generation to the next (`held_stages`), and lets each generation run from
`start_step + 1` to `last_step` (`generation_run`). A wish to stop or to write a checkpoint, given to any
worker, travels in the exchange at the end of a step, so that all act after the same step. The worker
decides nothing else: processes, the timing of heartbeats and restarts are the shell's and the head's.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from deepopt.checkpoint.export import export_weights
from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.datasets.read_ahead import ReadAhead, with_readers
from deepopt.errors import TransportError
from deepopt.pipeline.stage import Layer, Loss
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import Wish
from deepopt.pipeline.transport import Transport
from deepopt.planner.orders import load_schedule
from deepopt.run_directory import RunDirectory
from deepopt.worker import agreements, rendezvous
from deepopt.worker.device import choose_device, peak_flops, pin_gpu
from deepopt.worker.device_identity import product_name
from deepopt.worker.estate import Estate
from deepopt.worker.failure_description import describe_failure
from deepopt.worker.generation_run import GenerationRun
from deepopt.worker.held_stages import HeldStages, held_layers
from deepopt.worker.layer_ways import LayerWays
from deepopt.worker.messages import (
    Assignment,
    BadStep,
    CheckpointFailed,
    ExpertLoads,
    Failure,
    Heartbeat,
    RunEnded,
    ShardsWritten,
    Standing,
    StepReport,
    WeightWork,
    WorkerReady,
)
from deepopt.worker.replicas import ReplicaKeeper, keeps_replicas, layers_without_copy
from deepopt.worker.step_reports import StepReports
from deepopt.worker.warmth import Warmth, warm_up
from deepopt.worker.wishes import Wishes

Report = Callable[
    [StepReport | WeightWork | ExpertLoads | BadStep | ShardsWritten | CheckpointFailed], None
]


class StageWorker:
    """The worker of one rank, in one generation after the other.

    Args:
        assignment: who it is and what it shall do.
        report: takes messages for the head; called from the training thread and from the
            checkpoint writer's thread, must not block for long.
        warmth: what `warm` made in this process; None: nothing is ready.
        before: who had this process under another plan or rank; None: nobody.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        report: Report,
        warmth: Warmth | None = None,
        before: StageWorker | None = None,
    ) -> None:
        self._warmth = warmth
        self._before = before
        self._estate: Estate | None = None
        self._assignment = assignment
        self._sender = assignment.sender
        self._job = assignment.job
        self._plan = assignment.plan
        self._run_directory = RunDirectory(Path(assignment.run_dir))
        self._report = report
        self._is_set_up = False
        self._wishes = Wishes()
        self._reports = StepReports(
            self._job,
            run_directory=self._run_directory,
            report=report,
            sender=self._sender,
            start_step=assignment.start_step,
        )
        # Made by setup(). --------------------------------------------------------------------
        self._transport: Transport | None = None
        self._held: HeldStages | None = None
        self._run: GenerationRun | None = None
        self._ready: WorkerReady | None = None
        self._ended_generation = 0  # the newest that was interrupted

    @staticmethod
    def warm(job: JobConfig, run_dir: Path, *, builds: bool = False) -> Warmth:
        """Do what does not depend on the rank, for a spare: as `warmth.warm_up`."""
        return warm_up(job, run_dir, builds=builds)

    @property
    def can_go_on(self) -> bool:
        """Whether it has layers that it can join another generation with."""
        return self._is_set_up or self._before is not None or self._estate is not None

    def fits(self, assignment: Assignment) -> bool:
        """Whether it has the very layers of an assignment: it can rejoin as it is."""
        same = assignment.plan == self._plan and assignment.sender.rank == self._sender.rank
        return self._is_set_up and same

    def setup(self) -> WorkerReady:
        """Join the group, build this worker's layers, load or receive their state.

        Raises:
            TransportError: a peer or the store did not answer.
            CheckpointError: a shard is damaged.
            InputError: model or data cannot be built here.
        """
        assignment, job, rank = self._assignment, self._job, self._sender.rank
        times: dict[str, float] = {}
        torch.set_num_threads(job.worker.threads)
        if self._before is not None:
            with _timed(times, "roll"):
                self._estate, self._before = self._before.bequeath(assignment), None
            self._wishes.add(self._estate.wishes)
        with _timed(times, "build"):
            pin_gpu(job, rank=rank)
            device = choose_device(job)
            self._transport = rendezvous.make_transport(assignment, device=device)
            if self._ended_generation:  # that word came before there was a transport
                self._transport.interrupt(self._ended_generation)
            known = self._warmth or self._estate
            skeleton = (known and known.skeleton) or describe(job)
            batches = self._open_batches(None if known is None else known.batches)
            indices = held_layers(assignment)
            layers, loss = self._take_layers(indices, device) or build_layers(
                job, indices, device=device
            )
            self._warmth = None  # what it has and nobody takes shall hold no memory
            self._reports.layer_ways = ways = LayerWays(
                job, product=product_name(device), layers=layers
            )
        with _timed(times, "rendezvous"):
            self._transport.join(
                rendezvous.open_store(assignment), generation=self._sender.generation
            )
        with _timed(times, "load"):
            pipeline = PipelineStep(
                job=job,
                plan=self._plan,
                skeleton=skeleton,
                rank=rank,
                layers=dict(zip(indices, layers, strict=True)),
                loss=loss,
                transport=self._transport,
                batches=batches,
                device=device,
                schedule=load_schedule(
                    self._plan,
                    data_index=rank // self._plan.pipeline_size,
                    folder=self._run_directory.schedules,
                ),
                known_ways=ways.fitting(assignment.known_ways),
            )
            self._held = HeldStages(
                device=device,
                skeleton=skeleton,
                transport=self._transport,
                batches=batches,
                reads_stream=batches is not None and batches.state_dict() is not None,
                pipeline=pipeline,
                keeper=self._make_keeper(pipeline, self._transport, device=device),
            )
            self._begin_generation(self._held)
        with _timed(times, "peak"):
            peak, source = peak_flops(job, device)
        self._is_set_up = True
        self._ready = WorkerReady(
            sender=self._sender,
            pid=os.getpid(),
            host=socket.gethostname(),
            stages=self._plan.held_stages(rank),
            device="emulated" if job.worker.device == "emulated" else str(device),
            setup_s=times,
            peak_flops=peak,
            peak_source=source,
            data_fingerprint=None if batches is None else batches.fingerprint,
        )
        return self._ready

    def _open_batches(self, known: BatchSource | None) -> BatchSource | None:
        """The data, where this worker holds the first or the last stage: others never see a batch."""
        stages = self._plan.held_stages(self._sender.rank)
        if 0 in stages or self._plan.num_stages - 1 in stages:
            root = self._run_directory.root
            return with_readers(
                known or build_batch_source(self._job, run_dir=root),
                job=self._job,
                run_dir=root,
            )
        if isinstance(known, ReadAhead):
            known.close()
        return None

    def _make_keeper(
        self, pipeline: PipelineStep, transport: Transport, *, device: torch.device
    ) -> ReplicaKeeper | None:
        faults = self._job.faults
        if not keeps_replicas(self._plan, faults.replicas):
            return None
        return ReplicaKeeper(
            transport=transport,
            export=pipeline.export,
            sent=layers_without_copy(self._plan, self._sender.rank),
            device=device,
            share=faults.replica_share,
        )

    def _take_layers(
        self, indices: Sequence[int], device: torch.device
    ) -> tuple[list[Layer], Loss] | None:
        """Layers that were built while this process waited; None where they are not there."""
        ready = None if self._warmth is None else self._warmth.layers
        return None if ready is None or device.type != "cpu" else ready.take(indices)

    def reassign(self, assignment: Assignment) -> None:
        """Take a place in a later generation: same plan, same rank. `rejoin` comes next.

        Args:
            assignment: of that generation.
        """
        self._assignment, self._sender = assignment, assignment.sender
        if self._run is not None:
            self._run.step = assignment.start_step
        self._reports.begin(self._sender, start_step=assignment.start_step)
        self._wishes.put_back()

    def rejoin(self) -> WorkerReady:
        """Join the generation of the last assignment with the layers of the one before.

        Raises:
            TransportError: a peer or the store did not answer.
            CheckpointError: a shard is damaged.
        """
        assert self._held is not None, "rejoin() before setup()"
        assert self._ready is not None, "rejoin() before setup()"
        times: dict[str, float] = {}
        with _timed(times, "roll"):
            if self._assignment.in_place is not None:
                self._held.roll(self._assignment)
        with _timed(times, "rendezvous"):
            self._held.pipeline.join(
                rendezvous.open_store(self._assignment), generation=self._sender.generation
            )
        with _timed(times, "load"):
            self._begin_generation(self._held)
        self._ready = replace(self._ready, sender=self._sender, setup_s=times)
        return self._ready

    def _begin_generation(self, held: HeldStages) -> None:
        """Make anew what carries the generation's number, and bring the layers to where it starts."""
        self._run = GenerationRun(
            self._assignment,
            held=held,
            run_directory=self._run_directory,
            reports=self._reports,
            report=self._report,
            wishes=self._wishes,
            before=self._run,
        )
        held.load(
            self._assignment,
            checkpointer=self._run.checkpointer,
            estate=self._estate,
            is_new=not self._is_set_up,
        )

    def bequeath(self, assignment: Assignment) -> Estate:
        """Bring the layers to where a group with another plan begins, and hand them over.

        Args:
            assignment: of this process in that group.

        Raises:
            TransportError: the exchange of the last step cannot be had.
        """
        if self._before is not None:
            return self._before.bequeath(assignment)
        if not self._is_set_up:
            kept = None if assignment.in_place is None else self._estate
            return kept or Estate(step=assignment.start_step)
        assert self._held is not None, "layers before setup()"
        assert self._run is not None, "layers before setup()"
        self.reassign(assignment)
        estate = self._held.hand_over(assignment)
        self._run.checkpointer.abandon()  # what it still writes is nobody's any more
        self._held.transport.close()
        return replace(estate, wishes=self._wishes.waiting & ~Wish.LEAVE)

    def interrupt(self, generation: int) -> None:
        """End all waits of this worker in a generation: its group has ended. From any thread."""
        self._ended_generation = max(self._ended_generation, generation)
        if self._transport is not None:
            self._transport.interrupt(generation)

    def run(self) -> RunEnded:
        """Train until `last_step` or until somebody asked to stop.

        Raises:
            TransportError: a peer is gone.
            TrainingError: the model or the numbers failed.
        """
        assert self._run is not None, "run() before setup()"
        self._run.catch_up(None if self._estate is None else self._estate.result)
        self._estate = None
        return self._run.run()

    def standing(self) -> Standing | None:
        """What this worker can go on with in another generation; None before it was set up."""
        if self._before is not None:
            return self._before.standing()
        if self._held is not None and self._is_set_up:
            return self._held.standing()
        estate = self._estate
        if estate is None:
            return None
        return Standing(
            version=estate.step,
            ready=False,
            layers=tuple(estate.layers),
            replicas={estate.step: tuple(estate.replicas)},
        )

    def let_go(self) -> None:
        """Leave the group that has failed, so that peers notice, and tell them the last exchange.

        Raises:
            TransportError: the store does not answer.
        """
        self.interrupt(self._sender.generation)
        if self._held is None:
            return
        keeper, agreement = self._held.keeper, self._held.pipeline.agreement
        if keeper is not None:
            keeper.settle(timeout_s=self._job.faults.survivor_timeout_s)
        if agreement is not None:
            agreements.tell(rendezvous.open_store(self._assignment), agreement)

    def move_store(self, host: str, port: int) -> None:
        """Meet the others in another store from now on: the head has been replaced.

        Args:
            host: IP address of the store.
            port: its port.
        """
        self._assignment = replace(self._assignment, store_host=host, store_port=port)
        if self._run is not None:
            self._run.move_store(host, port)

    def request_stop(self) -> None:
        """Ask all workers to stop after the step in work, with a checkpoint. From any thread."""
        self._wishes.add(Wish.STOP)

    def request_leave(self, generation: int) -> None:
        """Ask all workers to leave their group after the step in work. From any thread.

        Args:
            generation: which; nothing happens to a later one.
        """
        if generation == self._sender.generation:
            self._wishes.add(Wish.LEAVE)

    def request_checkpoint(self) -> None:
        """Ask all workers for a checkpoint after the step in work. From any thread."""
        self._wishes.add(Wish.CHECKPOINT)

    def heartbeat(self) -> Heartbeat:
        """Where this worker is. From any thread."""
        run, held = self._run, self._held
        executors = [] if held is None else [held.pipeline.executor]
        evaluation = None
        if run is not None and run.validation is not None:
            executors.append(run.validation.evaluator.executor)
            evaluation = run.validation.evaluator.progress()
        now_s = time.monotonic()
        action, began_s = next(
            ((a, e.action_began_s) for e in executors if (a := e.action) is not None),
            ("", now_s),
        )
        return Heartbeat(
            sender=self._sender,
            step=self._assignment.start_step if run is None else run.step,
            progress=sum(executor.progress for executor in executors),
            action=str(action),
            action_s=max(0.0, now_s - began_s),
            evaluation=evaluation,
        )

    def describe_failure(self, error: BaseException) -> Failure:
        """What the head should know of an error that `setup` or `run` raised."""
        return describe_failure(
            error,
            beat=self.heartbeat(),
            is_set_up=self._is_set_up,
            standing=self.standing() if isinstance(error, TransportError) else None,
        )

    def export(self, checkpoint_dir: str) -> str:
        """Write the final weights under the model's own names.

        Args:
            checkpoint_dir: a committed checkpoint.

        Returns:
            The folder written.
        """
        assert self._held is not None, "export() before setup()"
        export_weights(Path(checkpoint_dir), self._held.skeleton, self._run_directory.final)
        return str(self._run_directory.final)

    def close(self) -> None:
        """End the writer's thread and leave the process group."""
        if self._run is not None:
            self._run.checkpointer.close()
        if self._transport is not None:
            self._transport.close()


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        times[name] = time.perf_counter() - start
