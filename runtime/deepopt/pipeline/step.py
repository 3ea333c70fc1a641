"""One training step on one worker: execute the schedule, sum gradients, agree, update.

Workers agree in one exchange at the end of each step: losses, gradient norms, times and wishes.
From its rows every worker computes the same global norm and the same update; nobody applies half a step.

With `overlap_steps` a worker does not wait for the exchange: it keeps a copy of its layers, updates
them as if nothing were clipped, and runs the first forwards of the next step. When the rows are
there and say otherwise, it takes all of that back; the losses are the same either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.buffer_history import BufferHistory
from deepopt.pipeline.clip_forecast import ClipForecast
from deepopt.pipeline.emulated import Emulation
from deepopt.pipeline.evaluation import Evaluator
from deepopt.pipeline.exchange import Exchange
from deepopt.pipeline.executor import Batches, Executor
from deepopt.pipeline.layer_updates import LayerUpdates
from deepopt.pipeline.reduction import Bucket, Reducer, channels
from deepopt.pipeline.reporters import RoutersByReporter, TrainableParameters
from deepopt.pipeline.slowed_cpu import SlowedCpu, slow_factor
from deepopt.pipeline.spans import SpanRecorder, total
from deepopt.pipeline.stage import Layer, Loss
from deepopt.pipeline.stage_build import (
    count_buckets,
    make_stage,
    stage_bucket,
    tied_buckets,
)
from deepopt.pipeline.step_result import Agreement, StepResult, Wish
from deepopt.pipeline.transport import Store, Transport
from deepopt.pipeline.update_rule import make_rule
from deepopt.pipeline.weight_ways import Verdict
from deepopt.planner.orders import built_order
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.schedule.ir import Action, Op, Schedule
from deepopt.schedule.lowering import lower
from deepopt.schedule.run_ahead import run_ahead


class PipelineStep:
    """This worker's share of the model, ready to train.

    Args:
        job: the resolved job.
        plan: who holds what.
        skeleton: the whole model.
        rank: this worker's rank in the world.
        layers: the layers of the held stages, by index in the chain.
        loss: maps (output, targets) to a scalar mean.
        transport: to the other workers.
        batches: inputs and targets by (step, global micro-batch); None on a worker that holds
            neither the first nor the last stage.
        device: where the layers are.
        before_action: called before each action, for the fault script.
        schedule: order of this replica; None: the plan names a builder's.
        known_ways: how weight gradients of layers are computed, by name; the others are tried.

    Attributes:
        version: steps whose update the layers have.
        ready: whether the gradients of the step after `version` are whole here, so that the rows
            of its exchange are all that its update still needs.
        agreement: the exchange of the last update made here; None before the first.
        optimizers: by layer.
        updates: of the layers.
    """

    def __init__(
        self,
        *,
        job: JobConfig,
        plan: Plan,
        skeleton: ModelSkeleton,
        rank: int,
        layers: Mapping[int, Layer],
        loss: Loss,
        transport: Transport,
        batches: Batches | None,
        device: torch.device,
        before_action: Callable[[int, Action], None] | None = None,
        schedule: Schedule | None = None,
        known_ways: Mapping[str, Verdict] | None = None,
    ) -> None:
        self._job = job
        self._plan = plan
        self._rank = rank
        self._device = device
        self._update_s = 0.0
        self._ended: float | None = None  # the step before, on the clock of `perf_counter`
        self.parts_s: dict[str, float] = {}  # of the last step's end, by name
        self._forecast = ClipForecast()
        self._may_run_ahead = False  # nobody asked to wait in the last exchange
        self._eager_rate: float | None = None  # learning rate of updates that do not wait
        self._is_eager = False  # the step in work updates before it is agreed on
        self._recomputes = False  # the step in work had bad numbers before
        self.version = 0
        self.ready = False
        self.agreement: Agreement | None = None

        self._wire = transport
        data_index, pipeline_rank = divmod(rank, plan.pipeline_size)
        placement = plan.make_placement()
        schedule = schedule or built_order(plan, data_index=data_index)
        rows = lower(schedule, reduce=True)
        program = rows[pipeline_rank]
        emulation, self.overruns = None, None  # None: devices are real
        if job.worker.device == "emulated":
            emulation = Emulation(job, plan=plan, rank=rank, program=program)
            self.overruns = emulation.device.overruns
        factor = slow_factor(job, pipeline_rank=pipeline_rank, device=device)
        slowed = SlowedCpu(factor) if factor > 1 else None
        self._spans = (
            emulation.device if emulation is not None else slowed or SpanRecorder(device)
        )
        # An emulated device is told what W takes: there is nothing to find out.
        defer = emulation is None and any(action.op is Op.W for action in program)
        trainable = TrainableParameters(plan, skeleton)
        self._stages = {
            index: make_stage(
                index,
                plan=plan,
                rank=rank,
                layers=layers,
                trainable=trainable,
                seed=job.training.seed,
                device=device,
                loss=loss,
                recompute=plan.recomputed(
                    plan.stage_layers(index), all_of_them=job.pipeline.recompute == "full"
                ),
                defer_weights=defer,
                known_ways=known_ways or {},
            )
            for index in plan.held_stages(rank)
        }
        buckets = {i: stage_bucket(stage, plan=plan) for i, stage in self._stages.items()}
        # What is summed when all stages are done.
        self._late_buckets = (
            *tied_buckets(self._stages, plan=plan, trainable=trainable),
            *count_buckets(self._stages, plan=plan, rank=rank, trainable=trainable),
        )
        if emulation is not None:
            transport = emulation.transport(transport, buckets=buckets)
        self._before_updates: Callable[[], AbstractContextManager[None]] = (
            nullcontext if emulation is None else emulation.device.before_updates
        )
        self._transport = transport
        self._reducer = Reducer(transport)
        self._rule = make_rule(job.optimizer)
        self.optimizers = {
            layer.name: self._rule.optimizer(layer)
            if emulation is None
            else emulation.optimizer(layer, rule=self._rule)
            for stage in self._stages.values()
            for layer in stage.layers
        }
        self.updates = LayerUpdates(
            self._stages,
            optimizers=self.optimizers,
            tied_names=trainable.tied_names,
            on_device=emulation.device.updates
            if emulation is not None
            else (slowed.updates if slowed is not None else nullcontext),
        )
        self._exchange = Exchange(
            job=job,
            plan=plan,
            rank=rank,
            stages=self._stages,
            trainable=trainable,
            routers=RoutersByReporter(plan, skeleton),
            rate=self._rule.rate,
        )
        self._buffers = BufferHistory(
            [layer for stage in self._stages.values() for layer in stage.layers]
        )
        self.executor = Executor(
            program,
            ahead=run_ahead(schedule, rows)[pipeline_rank],
            placement=placement,
            directions=schedule.directions,
            stages=self._stages,
            buckets=buckets,
            transport=transport,
            reducer=self._reducer,
            batches=batches,
            first_rank=data_index * plan.pipeline_size,
            first_microbatch=plan.replica_groups(data_index)[0][0],
            lookahead=job.pipeline.receive_lookahead,
            spans=self._spans,
            on_whole=self._update_early,
            before_action=before_action,
        )
        roads = dict.fromkeys(self.executor.channels())
        for bucket in (*buckets.values(), *self._late_buckets):
            roads |= dict.fromkeys(channels(bucket.holders, rank))
        transport.open(roads)

    def weight_notes(self) -> list[str]:
        """Why weight gradients of some layers do not wait for W, or only by a split graph; known
        after the first step."""
        return [note for stage in self._stages.values() for note in stage.weight_notes()]

    def weight_ways(self) -> dict[str, Verdict]:
        """How the weight gradients of the layers here are computed, by name; known after the first
        step, and empty where none waits for W."""
        return {n: v for stage in self._stages.values() for n, v in stage.verdicts.items()}

    def begin_at(self, version: int) -> None:
        """Start from layers that were just initialised, loaded or received.

        Args:
            version: steps whose update they have.
        """
        self._forget_step()
        self._buffers.clear()
        self.version, self.agreement = version, None

    def roll(self, to: int, *, agreement: Agreement | None = None) -> None:
        """Make the layers what they are after a step, and forget the one in work: its group has
        ended. Bit for bit what the next step began with, or would have.

        Args:
            to: `version`, or the step after it if `ready`.
            agreement: of the step after `version`, from a worker that has it.
        """
        eager, ready = self._is_eager, self.ready
        self._forget_step()
        if to == self.version + 1:
            assert ready, f"step {to} is not whole on rank {self._rank}"
            assert agreement is not None, f"nobody told the exchange of step {to}"
            assert agreement.step == to, f"the exchange of step {agreement.step}, not of {to}"
            result, coefficient = self._exchange.read(to, agreement.rows, [])
            skipped = result.bad is not None  # or nobody would have gone beyond it
            if eager and (skipped or coefficient < 1.0):
                self.updates.restore()
            if not skipped and (not eager or coefficient < 1.0):
                self.updates.scale(coefficient)
                self.updates.update(result.learning_rate)
            self.version, self.agreement = to, agreement
            if skipped:
                to -= 1  # its forwards left no trace either
        else:
            assert to == self.version, f"from step {self.version} to step {to}"
            if eager:
                self.updates.restore()
        self._buffers.restore(to)

    def export(self) -> dict[str, dict[str, torch.Tensor]]:
        """The states of the layers as after step `version`, by layer and key of `LayerState`.

        Nothing of it changes before the next call of `before_update`, so that another thread may
        read it while a step computes.
        """
        if not self.executor.is_ahead:
            self._buffers.keep(self.version)
        kept = self._buffers.as_of(self.version)
        return {
            name: {
                k: kept.get(id(tensor), tensor)
                for k, tensor in optimizer.export_state().items()
            }
            for name, optimizer in self.optimizers.items()
        }

    def join(self, store: Store, *, generation: int) -> None:
        """Form the group of a later generation with the same plan.

        Args:
            store: prefixed with the generation.
            generation: which.

        Raises:
            TransportError: the group did not form in time, or was interrupted.
        """
        self._transport.join(store, generation=generation)

    def result_of(self, agreement: Agreement) -> StepResult:
        """What a step came to, for its report.

        Args:
            agreement: of this plan's workers.
        """
        return self._exchange.read(agreement.step, agreement.rows, [])[0]

    def make_evaluator(self, batches: Batches | None, *, num_microbatches: int) -> Evaluator:
        """Evaluations of these layers; not emulated where training is.

        Args:
            batches: of the validation set; None on a worker that holds neither the first nor the
                last stage.
            num_microbatches: of it; the same on all workers.
        """
        return Evaluator(
            plan=self._plan,
            rank=self._rank,
            stages=self._stages,
            transport=self._wire,
            batches=batches,
            num_microbatches=num_microbatches,
            device=self._device,
            lookahead=self._job.pipeline.receive_lookahead,
        )

    def run(
        self,
        step: int,
        *,
        take_wishes: Callable[[], Wish] = lambda: Wish.NONE,
        go_on: bool = False,
    ) -> StepResult:
        """Train one step.

        Args:
            step: 1-based; the one after the last.
            take_wishes: what this worker was asked for; called at the exchange, so that a
                wish counts for the step in which it comes.
            go_on: whether the next step follows at once, so that it may be begun before this one's
                norms are known; the same on all workers.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; nothing was updated.
            TransportError: a peer is gone.
        """
        began = time.perf_counter()
        self.parts_s.clear()
        ahead = go_on and self._may_run_ahead and self._forecast.is_unlikely
        self.updates.begin_step()
        if not self.executor.is_ahead:
            self._buffers.keep(step - 1)
        self._is_eager = ahead
        if ahead:
            self.updates.save()
            self._eager_rate = self._rule.rate(step)
        if self._ended is not None:
            self.parts_s["turn_wall_s"] = time.perf_counter() - self._ended
        self.executor.run_step(step)
        reducing, cpu = time.perf_counter(), time.thread_time()
        for bucket in self._late_buckets:  # they travel with the last stage's gradients
            self._reducer.start(bucket)
        self._reducer.finish(self._update_summed)
        self._eager_rate = None
        with self._before_updates():
            self._take_counts()
        spans = self._spans.take()
        own_clock = self._device.type == "cuda" or self.overruns is not None
        totals = total(spans, device_time=own_clock)
        exchanging = time.perf_counter()
        totals.reduce_s += exchanging - reducing
        self.parts_s["reduce_wall_s"] = exchanging - reducing
        cpu = self._part("reduce_cpu_s", cpu)
        with self._before_updates():
            own = self._exchange.row(
                take_wishes(), totals, step_s=exchanging - began, update_s=self._update_s
            )
        gather = self._transport.start_all_gather(own)
        self._transport.finish_sends()  # receivers take them before they join the exchange
        if ahead:
            self.updates.update(self._rule.rate(step))
            self._update_s = time.perf_counter() - exchanging
        else:
            with self._before_updates():
                self.updates.balance()  # while the others' rows are on their way
        self.ready = True
        if ahead:
            self._buffers.keep(step)
            self.executor.run_ahead(step + 1)
        posted = time.perf_counter()
        self.parts_s["row_wall_s"] = posted - exchanging
        agreement = Agreement(step=step, rows=tuple(map(tuple, gather.wait())))
        self.parts_s["agree_wall_s"] = time.perf_counter() - posted
        cpu = self._part("agree_cpu_s", cpu)
        result, coefficient = self._exchange.read(step, agreement.rows, spans)
        if result.bad is not None:
            if ahead:
                self._take_back(step)
            return self._treat_bad(result, agreement)
        if ahead:
            result = self._confirm(step, result, coefficient)
        else:
            self.updates.scale(coefficient)
            self.updates.update(result.learning_rate)
            self._update_s = time.perf_counter() - exchanging
        self._part("update_cpu_s", cpu)
        self._ended = time.perf_counter()
        self.parts_s["update_wall_s"] = self._ended - posted - self.parts_s["agree_wall_s"]
        self.version, self.agreement = step, agreement
        self._is_eager = self.ready = False
        self._forecast = self._forecast.after(clipped=result.clipped)
        self._may_run_ahead = not result.wishes & Wish.WAIT and self._transport.world_size > 1
        return result

    def _treat_bad(self, result: StepResult, agreement: Agreement) -> StepResult:
        """Leave a step with bad numbers out, compute it again, or raise; all ranks do the same."""
        bad, policy = result.bad, self._job.faults.bad_step
        assert bad is not None, "good numbers need no treatment"
        self._is_eager = self.ready = False
        self._may_run_ahead = False
        self._buffers.restore(bad.step - 1)
        if policy == "fail" or self._recomputes:
            raise bad.error(again=self._recomputes)
        if policy == "skip":
            self.version, self.agreement = bad.step, agreement
            return replace(result, skipped=True)
        self._recomputes = True
        for stage in self._stages.values():
            stage.looks_for_bad = True
        try:
            again = self.run(bad.step, take_wishes=lambda: result.wishes)
        finally:
            self._recomputes = False
            for stage in self._stages.values():
                stage.looks_for_bad = False
        return replace(again, bad=bad)

    def _part(self, name: str, since_s: float) -> float:
        """Note the thread's CPU time since a moment under a name; the present moment."""
        now_s = time.thread_time()
        self.parts_s[name] = now_s - since_s
        return now_s

    def _take_counts(self) -> None:
        """What the routers counted in this step is summed: keep it, and shrink what it says."""
        for stage in self._stages.values():
            if stage.experts:
                stage.experts.latch()
                stage.experts.compensate(stage.gradients.totals())

    def _update_early(self, stage: int) -> None:
        """Update a stage in the middle of a step that runs ahead."""
        if self._eager_rate is not None:
            self.updates.update_early(stage, self._eager_rate)

    def _update_summed(self, bucket: Bucket) -> None:
        """Update a stage whose copies were summed, while those of others are under way."""
        if bucket.index < self._plan.num_stages:
            self._update_early(bucket.index)

    def _confirm(self, step: int, result: StepResult, coefficient: float) -> StepResult:
        """Keep what ran ahead, or take it back and do it right."""
        if coefficient < 1.0:
            self._take_back(step)
            self.updates.scale(coefficient)
            self.updates.update(result.learning_rate)
        elif result.wishes & (Wish.STOP | Wish.CHECKPOINT | Wish.LEAVE):
            # The layers are about to be saved or handed over as they are after this step.
            self.executor.abandon()
            self._buffers.restore(step)
        return replace(result, ran_ahead=True, rolled_back=coefficient < 1.0)

    def _take_back(self, step: int) -> None:
        self.executor.abandon()
        self.updates.restore()
        self._buffers.restore(step)

    def _forget_step(self) -> None:
        """Drop the step in work; all workers of the next group know as little of clipping."""
        self.executor.reset()
        self._reducer.forget()
        self._spans.take()
        self._eager_rate = self._ended = None
        self._is_eager = self.ready = False
        self._forecast = ClipForecast()
        self._may_run_ahead = False
