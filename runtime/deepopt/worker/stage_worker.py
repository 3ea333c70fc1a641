"""`StageWorker`: what one worker does, as a plain class: set up, train from step to step,
report.

It runs on its own from `start_step + 1` to `last_step`. A wish to stop or to write a
checkpoint, given to any worker, travels in the exchange at the end of a step, so that all act
after the same step. The worker decides nothing else: processes, the timing of heartbeats and
restarts are the shell's and the head's.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deepopt.checkpoint.export import export_weights
from deepopt.checkpoint.layer_files import read_manifest
from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.datasets.evaluation import evaluation_batches
from deepopt.datasets.read_ahead import ReadAhead, with_readers
from deepopt.errors import TransportError
from deepopt.pipeline.stage import Layer, Loss
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import Agreement, Wish
from deepopt.pipeline.transport import Transport
from deepopt.pipeline.update_rule import make_rule
from deepopt.planner.orders import load_schedule
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.worker import agreements, rendezvous
from deepopt.worker.bit_flip import flip_a_bit
from deepopt.worker.device import choose_device, peak_flops, pin_gpu
from deepopt.worker.device_identity import product_name
from deepopt.worker.estate import Estate, in_host_memory
from deepopt.worker.failure_description import describe_failure
from deepopt.worker.fault_script import FaultScript
from deepopt.worker.flat_state import State
from deepopt.worker.layer_checkpoint import LayerCheckpointer
from deepopt.worker.layer_ways import LayerWays
from deepopt.worker.messages import (
    Assignment,
    BadStep,
    CheckpointFailed,
    ExpertLoads,
    Failure,
    Heartbeat,
    InPlace,
    RunEnded,
    ShardsWritten,
    Standing,
    StepReport,
    WeightWork,
    WorkerReady,
)
from deepopt.worker.predictions import generation_folder
from deepopt.worker.ready_layers import ReadyLayers, build_ahead
from deepopt.worker.replicas import ReplicaKeeper, keeps_replicas, layers_without_copy
from deepopt.worker.state_transfer import transfer
from deepopt.worker.step_reports import StepReports
from deepopt.worker.validation import Validation

logger = logging.getLogger(__name__)

Report = Callable[
    [StepReport | WeightWork | ExpertLoads | BadStep | ShardsWritten | CheckpointFailed], None
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmth:
    """What a process can have ready before it knows its rank.

    Args:
        skeleton: the model.
        batches: the data.
        layers: that it has built; None where it has built none.
    """

    skeleton: ModelSkeleton
    batches: BatchSource
    layers: ReadyLayers | None = None


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
        self._step = assignment.start_step
        self._is_set_up = False
        self._wishes = Wish.NONE
        self._wishes_lock = threading.Lock()
        self._taken = Wish.NONE  # wishes that the exchange of the step in work carries
        self._reports = StepReports(
            self._job,
            run_directory=self._run_directory,
            report=report,
            sender=self._sender,
            start_step=self._step,
        )
        # Made by setup(). --------------------------------------------------------------------
        self._device = torch.device("cpu")
        self._skeleton: ModelSkeleton | None = None
        self._transport: Transport | None = None
        self._ended_generation = 0  # the newest that was interrupted
        self._batches: BatchSource | None = None
        self._reads_stream = False
        self._pipeline: PipelineStep | None = None
        self._checkpointer: LayerCheckpointer | None = None
        self._validation: Validation | None = None
        self._ready: WorkerReady | None = None
        self._keeper: ReplicaKeeper | None = None
        self._fault_script = FaultScript((), rank=self._sender.rank, generation=0)

    @staticmethod
    def warm(job: JobConfig, run_dir: Path, *, builds: bool = False) -> Warmth:
        """Do what does not depend on the rank: for a spare.

        Args:
            job: the resolved job.
            run_dir: the run directory.
            builds: whether to build layers, too, in host memory.

        Raises:
            InputError: model or data cannot be built here.
        """
        torch.set_num_threads(job.worker.threads)
        out = torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)
        # With gradients given, as in a step: the first such call imports sympy, for 0.4 s and more.
        torch.autograd.backward([out], [torch.ones(8, 8)])
        skeleton = describe(job)
        warmth = Warmth(
            skeleton=skeleton,
            batches=build_batch_source(job, run_dir=run_dir),
            layers=build_ahead(job, skeleton, run_dir=run_dir) if builds else None,
        )
        # What is imported stays. A collection that looks at all of it, a few hundred thousand objects,
        # takes 0.1 s and more, and would come while a replacement builds its layers.
        gc.collect()
        gc.freeze()
        return warmth

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
        assignment, job, plan, rank = self._assignment, self._job, self._plan, self._sender.rank
        times: dict[str, float] = {}
        torch.set_num_threads(job.worker.threads)
        if self._before is not None:
            with _timed(times, "roll"):
                self._estate, self._before = self._before.bequeath(assignment), None
            with self._wishes_lock:
                self._wishes |= self._estate.wishes
        with _timed(times, "build"):
            pin_gpu(job, rank=rank)
            self._device = choose_device(job)
            self._transport = rendezvous.make_transport(assignment, device=self._device)
            if self._ended_generation:  # that word came before there was a transport
                self._transport.interrupt(self._ended_generation)
            ready = self._warmth or self._estate
            self._skeleton = (ready and ready.skeleton) or describe(job)
            stages = plan.held_stages(rank)
            if 0 in stages or plan.num_stages - 1 in stages:  # others never see a batch
                self._batches = with_readers(
                    (ready and ready.batches)
                    or build_batch_source(job, run_dir=self._run_directory.root),
                    job=job,
                    run_dir=self._run_directory.root,
                )
                self._reads_stream = self._batches.state_dict() is not None
            elif ready is not None and isinstance(ready.batches, ReadAhead):
                ready.batches.close()
            indices = [i for stage in stages for i in plan.stage_layers(stage)]
            layers, loss = self._take_layers(indices) or build_layers(
                job, indices, device=self._device
            )
            self._warmth = None  # what it has and nobody takes shall hold no memory
            self._reports.layer_ways = ways = LayerWays(
                job, product=product_name(self._device), layers=layers
            )
        with _timed(times, "rendezvous"):
            self._transport.join(
                rendezvous.open_store(assignment), generation=self._sender.generation
            )
        with _timed(times, "load"):
            self._pipeline = PipelineStep(
                job=job,
                plan=plan,
                skeleton=self._skeleton,
                rank=rank,
                layers=dict(zip(indices, layers, strict=True)),
                loss=loss,
                transport=self._transport,
                batches=self._batches,
                device=self._device,
                schedule=load_schedule(
                    plan,
                    data_index=rank // plan.pipeline_size,
                    folder=self._run_directory.schedules,
                ),
                known_ways=ways.fitting(assignment.known_ways),
            )
            if keeps_replicas(plan, job.faults.replicas):
                self._keeper = ReplicaKeeper(
                    transport=self._transport,
                    export=self._pipeline.export,
                    sent=layers_without_copy(plan, rank),
                    device=self._device,
                    share=job.faults.replica_share,
                )
            self._begin_generation()
            self._load()
        with _timed(times, "peak"):
            peak, source = peak_flops(job, self._device)
        self._is_set_up = True
        self._ready = WorkerReady(
            sender=self._sender,
            pid=os.getpid(),
            host=socket.gethostname(),
            stages=stages,
            device="emulated" if job.worker.device == "emulated" else str(self._device),
            setup_s=times,
            peak_flops=peak,
            peak_source=source,
            data_fingerprint=None if self._batches is None else self._batches.fingerprint,
        )
        return self._ready

    def _take_layers(self, indices: Sequence[int]) -> tuple[list[Layer], Loss] | None:
        """Layers that were built while this process waited; None where they are not there."""
        ready = None if self._warmth is None else self._warmth.layers
        return None if ready is None or self._device.type != "cpu" else ready.take(indices)

    def reassign(self, assignment: Assignment) -> None:
        """Take a place in a later generation: same plan, same rank. `rejoin` comes next.

        Args:
            assignment: of that generation.
        """
        self._assignment, self._sender = assignment, assignment.sender
        self._step = assignment.start_step
        self._reports.begin(self._sender, start_step=self._step)
        with self._wishes_lock:  # nobody acted on what the forgotten step carried
            self._wishes |= self._taken
            self._taken = Wish.NONE

    def rejoin(self) -> WorkerReady:
        """Join the generation of the last assignment with the layers of the one before.

        Raises:
            TransportError: a peer or the store did not answer.
            CheckpointError: a shard is damaged.
        """
        assert self._pipeline is not None, "rejoin() before setup()"
        assert self._ready is not None, "rejoin() before setup()"
        times: dict[str, float] = {}
        in_place = self._assignment.in_place
        with _timed(times, "roll"):
            if in_place is not None:
                self._roll(in_place, to=self._assignment.start_step)
        with _timed(times, "rendezvous"):
            self._pipeline.join(
                rendezvous.open_store(self._assignment), generation=self._sender.generation
            )
        with _timed(times, "load"):
            self._begin_generation()
            self._load()
        self._ready = replace(self._ready, sender=self._sender, setup_s=times)
        return self._ready

    def bequeath(self, assignment: Assignment) -> Estate:
        """Bring the layers to where a group with another plan begins, and hand them over.

        Args:
            assignment: of this process in that group.

        Raises:
            TransportError: the exchange of the last step cannot be had.
        """
        step, in_place = assignment.start_step, assignment.in_place
        if self._before is not None:
            return self._before.bequeath(assignment)
        if not self._is_set_up:
            estate = self._estate or Estate(step=step)
            return estate if in_place is not None else Estate(step=step)
        assert self._pipeline is not None, "layers before setup()"
        assert self._transport is not None, "layers before setup()"
        self.reassign(assignment)
        layers: dict[str, State] = {}
        copies, result = None, None
        if in_place is not None:
            self._roll(in_place, to=step)
            layers = in_host_memory(self._pipeline.optimizers)
            copies = None if self._keeper is None else self._keeper.ward(step)
            if in_place.report and assignment.sender.rank == 0:
                agreement = self._pipeline.agreement or self._find_agreement(in_place, step)
                result = self._pipeline.result_of(agreement)
        if self._keeper is not None:
            self._keeper.close()
        if self._checkpointer is not None:  # what it still writes is nobody's any more
            self._checkpointer.abandon()
        self._transport.close()
        with self._wishes_lock:
            wishes = self._wishes & ~Wish.LEAVE
        return Estate(
            step=step,
            layers=layers,
            replicas={} if copies is None else copies.states,
            result=result,
            wishes=wishes,
            skeleton=self._skeleton,
            batches=None if self._reads_stream else self._batches,
        )

    def interrupt(self, generation: int) -> None:
        """End all waits of this worker in a generation: its group has ended. From any thread."""
        self._ended_generation = max(self._ended_generation, generation)
        if self._transport is not None:
            self._transport.interrupt(generation)

    def _roll(self, in_place: InPlace, *, to: int) -> None:
        """Make the layers those after a step, with its exchange from another worker if needed."""
        assert self._pipeline is not None, "a roll before setup()"
        if to < self._pipeline.version:
            assert self._keeper is not None, f"from step {self._pipeline.version} to {to}"
            copy = self._keeper.own(to)
            for name, optimizer in self._pipeline.optimizers.items():
                optimizer.load_state(copy.states[name])
            self._pipeline.begin_at(to)
            return
        agreement = None
        if to > self._pipeline.version:
            agreement = self._find_agreement(in_place, to)
        self._pipeline.roll(to, agreement=agreement)

    def _find_agreement(self, in_place: InPlace, step: int) -> Agreement:
        store = rendezvous.open_store(self._assignment, generation=in_place.previous_generation)
        return agreements.look_up(store, step, timeout_s=self._job.faults.setup_timeout_s)

    def _begin_generation(self) -> None:
        """What carries the generation's number and so is made anew with it."""
        assert self._pipeline is not None, "a generation before setup()"
        rank = self._sender.rank
        script = FaultScript(
            self._job.faults.inject,
            rank=rank,
            generation=self._sender.generation,
            blows={"cut": self._cut, "flip": self._flip_a_bit},
        )
        script.check(self._pipeline.executor.program)
        self._validation = self._make_validation()
        self._pipeline.executor.before_action = script if script else None
        self._pipeline.updates.before_update = self._before_update
        self._fault_script = script
        if self._checkpointer is not None:  # what it still writes is nobody's any more
            self._checkpointer.abandon()
        self._checkpointer = LayerCheckpointer(
            self._run_directory,
            job=self._job,
            plan=self._plan,
            sender=self._sender,
            optimizers=self._pipeline.optimizers,
            report=self._report,
        )
        if isinstance(self._batches, ReadAhead) and not self._job.evaluation.alone:
            order = self._pipeline.executor.microbatches_read()
            self._batches.expect(order, step=self._step + 1)

    def _before_update(self) -> None:
        if self._keeper is not None:
            self._keeper.wait_until_copied()
        self._fault_script(self._step, "UPDATE")

    def _cut(self) -> bool:
        assert self._transport is not None, "a step before setup()"
        self._transport.cut()
        return True

    def _flip_a_bit(self) -> bool:
        assert self._pipeline is not None, "a step before setup()"
        return flip_a_bit(o.layer for o in self._pipeline.optimizers.values())

    def _make_validation(self) -> Validation | None:
        if not self._job.evaluation.is_wanted:
            return None
        assert self._pipeline is not None, "a validation before setup()"
        assert self._transport is not None, "a validation before setup()"
        batches = None if self._validation is None else self._validation.batches
        reader = None if self._validation is None else self._validation.reader
        if batches is None and self._batches is not None:
            root, count = self._run_directory.root, self._job.evaluation.readers
            batches = evaluation_batches(self._job, run_dir=root)
            if count:
                reader = ReadAhead(
                    batches, job=self._job, run_dir=root, readers=count, of="evaluation"
                )
        return Validation(
            self._job,
            pipeline=self._pipeline,
            transport=self._transport,
            batches=batches,
            reader=reader,
            last_step=self._assignment.last_step,
        )

    def _load(self) -> None:
        """Bring this worker's layers to where the generation starts."""
        assert self._pipeline is not None, "a load before setup()"
        assert self._checkpointer is not None, "a load before setup()"
        assert self._transport is not None, "a load before setup()"
        assignment = self._assignment
        checkpoint, in_place = assignment.checkpoint, assignment.in_place
        if in_place is None:
            if checkpoint is not None:
                data_state = self._checkpointer.load(Path(checkpoint))
                if data_state is not None and self._batches is not None:
                    self._batches.load_state_dict(data_state)
            elif self._is_set_up:
                self._initialise()
            self._pipeline.begin_at(assignment.start_step)
            self._begin_copies(fresh=True)
            return
        copies = None if self._keeper is None else self._keeper.ward(assignment.start_step)
        estate = self._estate or Estate(
            step=assignment.start_step, replicas={} if copies is None else copies.states
        )
        for name in estate.layers.keys() & self._pipeline.optimizers.keys():
            self._pipeline.optimizers[name].load_state(estate.layers[name])
        transfer(
            in_place.transfers,
            transport=self._transport,
            optimizers=self._pipeline.optimizers,
            replicas=estate.replicas,
            held=estate.layers,
        )
        if not self._is_set_up:
            if self._reads_stream and checkpoint is not None:  # spares reading it all again
                data_state = read_manifest(Path(checkpoint)).data_state
                if data_state is not None and self._batches is not None:
                    self._batches.load_state_dict(data_state)
            self._pipeline.begin_at(assignment.start_step)
        self._begin_copies(fresh=False)

    def _begin_copies(self, *, fresh: bool) -> None:
        if self._keeper is not None:
            store = rendezvous.open_store(self._assignment)
            self._keeper.begin(
                store,
                step=self._assignment.start_step,
                fresh=fresh,
                timeout_s=self._job.faults.survivor_timeout_s,
            )

    def _initialise(self) -> None:
        """Give the layers the values that they began with."""
        assert self._pipeline is not None, "a load before setup()"
        indices = [
            i
            for stage in self._plan.held_stages(self._sender.rank)
            for i in self._plan.stage_layers(stage)
        ]
        layers, _ = build_layers(self._job, indices, device=self._device)
        for layer in layers:
            fresh = make_rule(self._job.optimizer).optimizer(layer)
            self._pipeline.optimizers[layer.name].load_state(fresh.export_state())

    def run(self) -> RunEnded:
        """Train until `last_step` or until somebody asked to stop.

        Raises:
            TransportError: a peer is gone.
            TrainingError: the model or the numbers failed.
        """
        assert self._pipeline is not None, "run() before setup()"
        assert self._checkpointer is not None, "run() before setup()"
        if self._job.evaluation.alone:
            return self._only_evaluate()
        reason = "finished"
        self._catch_up()
        self._estate = None
        ended = time.perf_counter()
        while self._step < self._assignment.last_step:
            self._step += 1
            result = self._pipeline.run(
                self._step, take_wishes=self._take_wishes, go_on=self._may_go_on()
            )
            self._taken = Wish.NONE
            if self._keeper is not None and not result.wishes & Wish.BUSY:
                self._keeper.take(self._step)
            began, ended = ended, time.perf_counter()
            stop = bool(result.wishes & Wish.STOP)
            leave = bool(result.wishes & Wish.LEAVE) and not stop
            scalars = {} if stop else self._evaluate_if_due()
            self._reports.account(
                self._step,
                result,
                pipeline=self._pipeline,
                tokens=self._tokens,
                step_time_s=ended - began,
                scalars=scalars,
            )
            ended += scalars.get("val_time_s", 0.0)
            if self._checkpoint_is_due(stop=stop, asked=bool(result.wishes & Wish.CHECKPOINT)):
                self._save()
            if stop:
                reason = "stopped"
                break
            if leave and self._step < self._assignment.last_step:
                reason = "left"
                break
        self._checkpointer.wait()
        if reason != "left":
            self._end_readers()
        return RunEnded(
            sender=self._sender,
            step=self._step,
            reason=reason,
            op_times_s=self._reports.op_times_s(),
            parts_s=self._reports.parts_s(),
            overruns=self._pipeline.overruns,
            standing=self.standing(),
        )

    def _catch_up(self) -> None:
        """Do what the group before could not any more: the last step's report and checkpoint."""
        assert self._pipeline is not None, "run() before setup()"
        in_place = self._assignment.in_place
        if in_place is None:
            return
        scalars = self._evaluate_if_due() if in_place.report else {}
        if in_place.report and self._sender.rank == 0:
            result = None if self._estate is None else self._estate.result
            if result is None:
                found = self._pipeline.agreement or self._find_agreement(in_place, self._step)
                result = self._pipeline.result_of(found)
            step_time_s = result.times[0].step_s
            self._reports.tell_step(
                self._step,
                result,
                tokens=self._tokens,
                step_time_s=step_time_s,
                scalars=scalars,
            )
        if in_place.save:
            self._save()

    def _only_evaluate(self) -> RunEnded:
        """One evaluation in the place of all steps."""
        assert self._validation is not None, "an evaluation without a validation set"
        self._step = self._assignment.last_step
        if self._job.evaluation.outputs:
            root = self._run_directory.predictions
            folder = generation_folder(root, self._sender.generation)
            self._validation.write_outputs(folder, rank=self._sender.rank)
        else:
            self._reports.tell_evaluation(self._step, self._validation.run())
        self._end_readers()
        return RunEnded(
            sender=self._sender,
            step=self._step,
            reason="finished",
            op_times_s={},
            overruns=None,
        )

    def _end_readers(self) -> None:
        """Nobody will ask for data any more."""
        reader = None if self._validation is None else self._validation.reader
        for one in (self._batches, reader):
            if isinstance(one, ReadAhead):
                one.close()

    def _evaluate_if_due(self) -> dict[str, float]:
        """Figures of the validation set after the step done; none where it is not due."""
        validation = self._validation
        if validation is None or not validation.is_due(self._step):
            return {}
        return validation.run()

    def standing(self) -> Standing | None:
        """What this worker can go on with in another generation; None before it was set up."""
        pipeline, estate = self._pipeline, self._estate
        if self._before is not None:
            return self._before.standing()
        if pipeline is None or not self._is_set_up:
            if estate is None:
                return None
            return Standing(
                version=estate.step,
                ready=False,
                layers=tuple(estate.layers),
                replicas={estate.step: tuple(estate.replicas)},
            )
        keeper = self._keeper
        return Standing(
            version=pipeline.version,
            ready=pipeline.ready,
            layers=tuple(pipeline.optimizers),
            replicas={} if keeper is None else keeper.replicas,
            held=() if keeper is None else keeper.held,
        )

    def let_go(self) -> None:
        """Leave the group that has failed, so that peers notice, and tell them the last exchange.

        Raises:
            TransportError: the store does not answer.
        """
        self.interrupt(self._sender.generation)
        if self._keeper is not None:
            self._keeper.settle(timeout_s=self._job.faults.survivor_timeout_s)
        if self._pipeline is not None and self._pipeline.agreement is not None:
            store = rendezvous.open_store(self._assignment)
            agreements.tell(store, self._pipeline.agreement)

    def move_store(self, host: str, port: int) -> None:
        """Meet the others in another store from now on: the head has been replaced.

        Args:
            host: IP address of the store.
            port: its port.
        """
        self._assignment = replace(self._assignment, store_host=host, store_port=port)

    def request_stop(self) -> None:
        """Ask all workers to stop after the step in work, with a checkpoint. From any thread."""
        with self._wishes_lock:
            self._wishes |= Wish.STOP

    def request_leave(self, generation: int) -> None:
        """Ask all workers to leave their group after the step in work. From any thread.

        Args:
            generation: which; nothing happens to a later one.
        """
        with self._wishes_lock:
            if generation == self._sender.generation:
                self._wishes |= Wish.LEAVE

    def request_checkpoint(self) -> None:
        """Ask all workers for a checkpoint after the step in work. From any thread."""
        with self._wishes_lock:
            self._wishes |= Wish.CHECKPOINT

    def heartbeat(self) -> Heartbeat:
        """Where this worker is. From any thread."""
        executors = [] if self._pipeline is None else [self._pipeline.executor]
        evaluation = None
        if self._validation is not None:
            executors.append(self._validation.evaluator.executor)
            evaluation = self._validation.evaluator.progress()
        now_s = time.monotonic()
        action, began_s = next(
            ((a, e.action_began_s) for e in executors if (a := e.action) is not None),
            ("", now_s),
        )
        return Heartbeat(
            sender=self._sender,
            step=self._step,
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
        assert self._skeleton is not None, "export() before setup()"
        export_weights(Path(checkpoint_dir), self._skeleton, self._run_directory.final)
        return str(self._run_directory.final)

    def close(self) -> None:
        """End the writer's thread and leave the process group."""
        if self._checkpointer is not None:
            self._checkpointer.close()
        if self._transport is not None:
            self._transport.close()

    def _take_wishes(self) -> Wish:
        self._fault_script(self._step, "EXCHANGE")
        with self._wishes_lock:
            self._taken, self._wishes = self._wishes, Wish.NONE
        wishes = self._taken
        if self._keeper is not None and self._keeper.busy:
            wishes |= Wish.BUSY
        # A stream's position cannot go back to the end of the step before.
        return wishes | Wish.WAIT if self._reads_stream else wishes

    def _may_go_on(self) -> bool:
        """Whether the next step may begin before this one is agreed on: nothing is saved between
        them."""
        evaluates = self._validation is not None and self._validation.is_due(self._step)
        saves = self._checkpoint_is_due(stop=False, asked=False)
        return self._job.pipeline.overlap_steps and not saves and not evaluates

    @property
    def _tokens(self) -> int:
        """Of a whole step; 0 where no batches are read."""
        if self._batches is None:
            return 0
        return self._batches.tokens_per_microbatch * self._plan.num_microbatches

    def _checkpoint_is_due(self, *, stop: bool, asked: bool) -> bool:
        every = self._job.checkpoint.every
        regular = every > 0 and self._step % every == 0
        return stop or asked or regular or self._step == self._assignment.last_step

    def _save(self) -> None:
        assert self._checkpointer is not None, "a checkpoint before setup()"
        data_state = None
        if self._sender.rank == 0:
            assert self._batches is not None, "rank 0 holds the first stage"
            data_state = self._batches.state_dict()
        self._fault_script(self._step, "SAVE")
        self._checkpointer.save(self._step, data_state=data_state)


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        times[name] = time.perf_counter() - start
