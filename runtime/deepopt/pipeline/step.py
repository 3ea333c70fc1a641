"""One training step on one worker: execute the schedule, sum gradients, agree, update.

Workers agree in one exchange at the end of each step: losses, gradient norms, times and wishes.
From its rows every worker computes the same global norm and the same update; nobody applies half a step.

With `overlap_steps` a worker does not wait for the exchange: it keeps a copy of its layers, updates
them as if nothing were clipped, and runs the first forwards of the next step. When the rows are
there and say otherwise, it takes all of that back; the losses are the same either way.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from deepopt.config import JobConfig
from deepopt.errors import TrainingError
from deepopt.pipeline.buffer_history import BufferHistory
from deepopt.pipeline.clip_forecast import ClipForecast
from deepopt.pipeline.emulated import Emulation
from deepopt.pipeline.evaluation import Evaluator
from deepopt.pipeline.executor import Batches, Executor
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.optimizer import clip_coefficient
from deepopt.pipeline.reduction import Bucket, Reducer, channels
from deepopt.pipeline.spans import Span, SpanRecorder, Totals, total
from deepopt.pipeline.stage import Layer, Loss, Stage
from deepopt.pipeline.stage_experts import NUM_FIGURES, count_routers, summarise
from deepopt.pipeline.transport import Store, Transport
from deepopt.pipeline.update_rule import make_rule
from deepopt.planner.orders import built_order
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.schedule.ir import Action, Op, Schedule
from deepopt.schedule.lowering import lower
from deepopt.schedule.run_ahead import run_ahead


class Wish(enum.IntFlag):
    """What somebody asked a worker for; all workers act on it after the same step."""

    NONE = 0
    STOP = 1
    CHECKPOINT = 2
    BUSY = 8  # copies for peers are still under way
    WAIT = 4  # do not run ahead: this worker's data cannot be asked for twice


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """Seconds of one worker's step; `update_s` is of the step before, known only after the
    exchange."""

    step_s: float
    compute_s: float
    wait_s: float
    send_s: float
    reduce_s: float
    update_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BadNumbers:
    """What is wrong with the numbers of a step.

    Args:
        step: the step.
        what: the values, in words.
        layer: the first layer whose output was not finite; None where all were, or nobody looked.
        rank: the worker that has it.
    """

    step: int
    what: str
    layer: str | None = None
    rank: int | None = None

    def error(self, *, again: bool) -> TrainingError:
        """The error that ends the job.

        Args:
            again: whether the step was computed twice, and both times came out so.
        """
        where = f", first in the output of layer {self.layer} on rank {self.rank}"
        return TrainingError(
            f"step {self.step}: {self.what}{where if self.layer else ''}; the update was not applied"
            + (", and computing the step again came out bad as well" if again else ""),
            remedy="lower optimizer.learning_rate, lengthen optimizer.warmup_steps, resume from a "
            "checkpoint before this step, or set faults.bad_step to skip",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What every worker knows after a step.

    Args:
        loss: mean over the step's micro-batches.
        grad_norm: global norm before clipping.
        learning_rate: used in the update.
        wishes: of all workers together.
        times: by rank.
        spans: of this worker, with those of the next step that ran ahead.
        clipped: whether the gradients were scaled down.
        ran_ahead: whether the next step was begun before this one's norms were known.
        rolled_back: whether that was taken back, because the gradients had to be clipped.
        bad: what was wrong with its numbers, where it was left out or computed again.
        skipped: whether it was left out: no update was made.
        experts: how evenly experts were loaded, by name of the figure; empty without experts.
        expert_loads: (layer, tokens of each expert) of this worker's routers, where it is the first
            holder of the layer.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    wishes: Wish
    times: tuple[RankTimes, ...]
    spans: list[Span]
    clipped: bool
    ran_ahead: bool = False
    rolled_back: bool = False
    bad: BadNumbers | None = None
    skipped: bool = False
    experts: Mapping[str, float] = field(default_factory=dict)
    expert_loads: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The exchange at the end of a step: all that the workers decide its update by.

    Args:
        step: the step.
        rows: of each rank, what it gave.
    """

    step: int
    rows: tuple[tuple[float, ...], ...]


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

    Attributes:
        version: steps whose update the layers have.
        ready: whether the gradients of the step after `version` are whole here, so that the rows
            of its exchange are all that its update still needs.
        agreement: the exchange of the last update made here; None before the first.
        before_update: called before weights and moments change.
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
    ) -> None:
        self._job = job
        self._plan = plan
        self._rank = rank
        self._device = device
        self._update_s = 0.0
        self.parts_s: dict[str, float] = {}  # of the last step's end, by name
        self._forecast = ClipForecast()
        self._is_balanced = False  # the routers' biases were updated in the step in work
        self._may_run_ahead = False  # nobody asked to wait in the last exchange
        self._eager_rate: float | None = None  # learning rate of updates that do not wait
        self._updated: set[str] = set()  # layers updated in the step in work
        self._is_eager = False  # the step in work updates before it is agreed on
        self._recomputes = False  # the step in work had bad numbers before
        self.before_update: Callable[[], None] = lambda: None
        self.version = 0
        self.ready = False
        self.agreement: Agreement | None = None
        self._trainable = _TrainableParameters(plan, skeleton)
        self._routers = _RoutersByReporter(plan, skeleton)

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
        self._spans = SpanRecorder(device) if emulation is None else emulation.device
        # An emulated device is told what W takes: there is nothing to find out.
        defer = emulation is None and any(action.op is Op.W for action in program)
        self._stages = {
            index: self._make_stage(index, layers, loss, defer=defer)
            for index in plan.held_stages(rank)
        }
        buckets = {index: self._stage_bucket(index) for index in self._stages}
        self._tied_buckets = self._make_tied_buckets()
        self._count_buckets = self._make_count_buckets()
        if emulation is not None:
            transport = emulation.transport(transport, buckets=buckets)
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
        for bucket in (*buckets.values(), *self._tied_buckets, *self._count_buckets):
            roads |= dict.fromkeys(channels(bucket.holders, rank))
        transport.open(roads)

    def weight_notes(self) -> list[str]:
        """Why weight gradients of some layers do not wait for W, or only by a split graph; known
        after the first step."""
        return [note for stage in self._stages.values() for note in stage.weight_notes()]

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
            result, coefficient = self._agree(to, agreement.rows, [])
            skipped = result.bad is not None  # or nobody would have gone beyond it
            if eager and (skipped or coefficient < 1.0):
                self._restore_optimizers()
            if not skipped and (not eager or coefficient < 1.0):
                self._scale(coefficient)
                self._update(result.learning_rate)
            self.version, self.agreement = to, agreement
            if skipped:
                to -= 1  # its forwards left no trace either
        else:
            assert to == self.version, f"from step {self.version} to step {to}"
            if eager:
                self._restore_optimizers()
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
        return self._agree(agreement.step, agreement.rows, [])[0]

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
        self._updated.clear()
        self._is_balanced = False
        if not self.executor.is_ahead:
            self._buffers.keep(step - 1)
        self._is_eager = ahead
        if ahead:
            for optimizer in self.optimizers.values():
                optimizer.save()
            self._eager_rate = self._rule.rate(step)
        self.executor.run_step(step)
        self._eager_rate = None
        reducing, cpu = time.perf_counter(), time.thread_time()
        self._reducer.finish()
        for bucket in (*self._tied_buckets, *self._count_buckets):
            self._reducer.start(bucket)
        self._reducer.finish()
        self._take_counts()
        spans = self._spans.take()
        own_clock = self._device.type == "cuda" or self.overruns is not None
        totals = total(spans, device_time=own_clock)
        totals.reduce_s += time.perf_counter() - reducing

        exchanging = time.perf_counter()
        cpu = self._part("reduce_cpu_s", cpu)
        own = self._row(take_wishes(), totals, step_s=exchanging - began)
        exchange = self._transport.start_all_gather(own)
        self._transport.finish_sends()  # receivers take them before they join the exchange
        if ahead:
            self._update(self._rule.rate(step))
            self._update_s = time.perf_counter() - exchanging
        self.ready = True
        if ahead:
            self._buffers.keep(step)
            self.executor.run_ahead(step + 1)
        posted = time.perf_counter()
        agreement = Agreement(step=step, rows=tuple(map(tuple, exchange.wait())))
        self.parts_s["agree_wall_s"] = time.perf_counter() - posted
        cpu = self._part("agree_cpu_s", cpu)
        result, coefficient = self._agree(step, agreement.rows, spans)
        if result.bad is not None:
            if ahead:
                self._take_back(step)
            return self._treat_bad(result, agreement)
        if ahead:
            result = self._confirm(step, result, coefficient)
        else:
            self._scale(coefficient)
            self._update(result.learning_rate)
            self._update_s = time.perf_counter() - exchanging
        self._part("update_cpu_s", cpu)
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
        if policy == "fail" or self._recomputes:
            raise bad.error(again=self._recomputes)
        self._buffers.restore(bad.step - 1)
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

    # The update, early or late. ----------------------------------------------------------------

    def _update_early(self, stage: int) -> None:
        """Update a stage in the middle of a step that runs ahead; tied weights wait for their
        other uses."""
        if self._eager_rate is None:
            return
        tied = self._trainable.tied_names
        layers = [
            layer
            for layer in self._stages[stage].layers
            if not tied & layer.trainable.keys()
            and not self._stages[stage].experts.waits_for_norms(layer.name)
        ]
        self._update_layers(stage, layers, self._eager_rate)

    def _take_counts(self) -> None:
        """What the routers counted in this step is summed: keep it, and shrink what it says."""
        for stage in self._stages.values():
            if stage.experts:
                stage.experts.latch()
                stage.experts.compensate(stage.gradients.totals())

    def _balance(self) -> None:
        """The one update of the routers' biases in a step; it does not depend on clipping, so it is not
        taken back with that of the weights."""
        if self._is_balanced:
            return
        self._is_balanced = True
        for stage in self._stages.values():
            stage.experts.update()

    def _update(self, rate: float) -> None:
        self._balance()
        for index, stage in self._stages.items():
            layers = [layer for layer in stage.layers if layer.name not in self._updated]
            self._update_layers(index, layers, rate)

    def _update_layers(self, stage: int, layers: Sequence[Layer], rate: float) -> None:
        self.before_update()
        grads = self._stages[stage].gradients.totals()
        for layer in layers:
            self.optimizers[layer.name].step(grads, rate)
            self._updated.add(layer.name)

    def _scale(self, coefficient: float) -> None:
        if coefficient < 1.0:
            for stage in self._stages.values():
                stage.gradients.scale(coefficient)

    def _confirm(self, step: int, result: StepResult, coefficient: float) -> StepResult:
        """Keep what ran ahead, or take it back and do it right."""
        if coefficient < 1.0:
            self._take_back(step)
            self._scale(coefficient)
            self._update(result.learning_rate)
        elif result.wishes & (Wish.STOP | Wish.CHECKPOINT):
            # The layers are about to be saved as they are after this step.
            self.executor.abandon()
            self._buffers.restore(step)
        return replace(result, ran_ahead=True, rolled_back=coefficient < 1.0)

    def _take_back(self, step: int) -> None:
        self.executor.abandon()
        self._restore_optimizers()
        self._buffers.restore(step)

    def _restore_optimizers(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.restore()
        self._updated.clear()

    def _forget_step(self) -> None:
        """Drop the step in work; all workers of the next group know as little of clipping."""
        self.executor.reset()
        self._reducer.forget()
        self._spans.take()
        self._eager_rate = None
        self._is_eager = self.ready = False
        self._forecast = ClipForecast()
        self._may_run_ahead = False

    # Building.
    # ---------------------------------------------------------------------------------

    def _make_stage(
        self, index: int, layers: Mapping[int, Layer], loss: Loss, *, defer: bool
    ) -> Stage:
        plan, job = self._plan, self._job
        held = [layers[i] for i in plan.stage_layers(index)]
        bounds = [b for d in range(plan.data_size) for b in plan.replica_groups(d)]
        owners = plan.group_owners(index)
        groups = [g for g, r in enumerate(owners) if r == self._rank]
        parameters = {name: p for layer in held for name, p in layer.trainable.items()}
        return Stage(
            index,
            held,
            gradients=StageGradients(
                parameters,
                apart=[name for name in parameters if name in self._trainable.tied_names],
                groups=groups,
                device=self._device,
                exchanged=len(set(owners)) > 1,
            ),
            group_of={m: g for g in groups for m in range(*bounds[g])},
            seed=job.training.seed,
            device=self._device,
            num_microbatches=plan.num_microbatches,
            loss=loss if index == plan.num_stages - 1 else None,
            recompute=plan.recomputed(
                plan.stage_layers(index), all_of_them=job.pipeline.recompute == "full"
            ),
            defer_weights=defer,
        )

    def _stage_bucket(self, index: int) -> Bucket:
        gradients = self._stages[index].gradients
        rows = [row[gradients.own] for row in gradients.rows]
        return Bucket(
            index=index,
            owners=(self._plan.group_owners(index),),
            numel=rows[0].numel(),
            terms={(0, g): row for g, row in zip(gradients.groups, rows, strict=True)},
            results=(rows[0],),
        )

    def _make_tied_buckets(self) -> list[Bucket]:
        """One bucket for each tied parameter that this worker holds a use of."""
        buckets = []
        for number, uses in enumerate(self._trainable.tied_uses):
            terms: dict[tuple[int, int], torch.Tensor] = {}
            results: list[torch.Tensor] = []
            numel = 0
            for use, (stage_index, name) in enumerate(uses):
                stage = self._stages.get(stage_index)
                if stage is None:
                    continue
                gradients = stage.gradients
                rows = [row[gradients.region(name)] for row in gradients.rows]
                terms |= {(use, g): r for g, r in zip(gradients.groups, rows, strict=True)}
                results.append(rows[0])
                numel = rows[0].numel()
            if terms:
                buckets.append(
                    Bucket(
                        index=self._plan.num_stages + number,
                        owners=tuple(self._plan.group_owners(stage) for stage, _ in uses),
                        numel=numel,
                        terms=terms,
                        results=tuple(results),
                    )
                )
        return buckets

    def _make_count_buckets(self) -> list[Bucket]:
        """One bucket for each stage with routers that this worker shares with others."""
        first = self._plan.num_stages + len(self._trainable.tied_uses)
        return [
            stage.experts.bucket(
                first + index, holders=self._plan.holders(index), rank=self._rank
            )
            for index, stage in self._stages.items()
            if stage.experts and len(self._plan.holders(index)) > 1
        ]

    # The exchange at the end of a step.
    # ----------------------------------------------------------

    def _row(self, wishes: Wish, totals: Totals, *, step_s: float) -> list[float]:
        losses = [0.0] * self._plan.num_microbatches
        last = self._stages.get(self._plan.num_stages - 1)
        if last is not None:
            values = torch.stack([loss.float() for loss in last.losses.values()]).tolist()
            for microbatch, value in zip(last.losses, values, strict=True):
                losses[microbatch] = value
        norms = self._own_norms()
        norms += [0.0] * (self._trainable.most_norms - len(norms))
        times = [step_s, totals.compute_s, totals.wait_s, totals.send_s, totals.reduce_s]
        figures = self._own_figures()
        figures += [0.0] * (self._routers.most_figures - len(figures))
        bad = min((s.bad_layer for s in self._stages.values() if s.bad_layer >= 0), default=-1)
        return [
            float(wishes),
            *times,
            self._update_s,
            *losses,
            *norms,
            *figures,
            float(bad),
        ]

    def _own_figures(self) -> list[float]:
        return [
            number
            for index in self._routers.by_reporter.get(self._rank, ())
            for figures in self._stages[index].experts.figures()
            for number in figures.row()
        ]

    def _own_norms(self) -> list[float]:
        names = self._trainable.by_reporter.get(self._rank, ())
        if not names:
            return []
        totals: dict[str, torch.Tensor] = {}
        for stage in self._stages.values():
            totals |= stage.gradients.totals()
        norms = torch.stack([torch.linalg.vector_norm(totals[name]) for name in names])
        values: list[float] = norms.tolist()
        return values

    def _agree(
        self, step: int, rows: Sequence[Sequence[float]], spans: list[Span]
    ) -> tuple[StepResult, float]:
        """What the rows of all ranks say: the result, and what to scale the gradients by."""
        plan = self._plan
        wishes = Wish.NONE
        for row in rows:
            wishes |= Wish(int(row[0]))
        num_losses = plan.num_microbatches
        owners = plan.group_owners(plan.num_stages - 1)
        losses: list[float] = []
        for data_index in range(plan.data_size):
            offset = data_index * len(plan.replica_groups(0))
            for local, (start, end) in enumerate(plan.replica_groups(data_index)):
                losses += rows[owners[offset + local]][7 + start : 7 + end]
        norms = {
            name: norm
            for rank, names in self._trainable.by_reporter.items()
            for name, norm in zip(names, rows[rank][7 + num_losses :], strict=False)
        }
        ordered = [norms[name] for name in self._trainable.names]
        grad_norm, coefficient = clip_coefficient(
            ordered, max_norm=self._job.training.grad_clip
        )
        loss = math.fsum(losses) / num_losses
        limit = self._job.faults.norm_limit
        bad = None
        figures = self._routers.read(rows, first=7 + num_losses + self._trainable.most_norms)
        num_bad_scores = sum(int(figure[-1]) for figure in figures)
        if not math.isfinite(loss + grad_norm) or (limit is not None and grad_norm > limit):
            places = {int(row[-1]): rank for rank, row in enumerate(rows) if row[-1] >= 0}
            first = min(places, default=None)
            bad = BadNumbers(
                step=step,
                what=_what_is_bad(
                    losses, norms, self._trainable.names, grad_norm=grad_norm, limit=limit
                ),
                layer=None if first is None else plan.layer_names[first],
                rank=None if first is None else places[first],
            )
        elif num_bad_scores:
            bad = BadNumbers(
                step=step,
                what=f"the scores of routers are not finite for {num_bad_scores} tokens",
                layer=None,
                rank=None,
            )
        result = StepResult(
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._rule.rate(step),
            wishes=wishes,
            times=tuple(
                RankTimes(
                    step_s=row[1],
                    compute_s=row[2],
                    wait_s=row[3],
                    send_s=row[4],
                    reduce_s=row[5],
                    update_s=row[6],
                )
                for row in rows
            ),
            spans=spans,
            clipped=coefficient < 1.0,
            bad=bad,
            experts=summarise(figures),
            expert_loads=tuple(
                load
                for index in self._routers.by_reporter.get(self._rank, ())
                for load in self._stages[index].experts.loads()
            ),
        )
        return result, coefficient


class _TrainableParameters:
    """Which parameters there are to norm and to tie, and who reports which norm: the same on
    every worker."""

    def __init__(self, plan: Plan, skeleton: ModelSkeleton) -> None:
        stage_of = {
            skeleton.layers[i].name: stage
            for stage in range(plan.num_stages)
            for i in plan.stage_layers(stage)
        }
        self.names: list[str] = []
        uses: dict[str, list[tuple[int, str]]] = {}
        reporters: dict[int, list[str]] = {}
        for layer in skeleton.layers:
            own = {p.name for p in layer.parameters}
            for parameter in layer.parameters:
                if not parameter.requires_grad or parameter.tied_to in own:
                    continue
                stage = stage_of[layer.name]
                source = parameter.tied_to or parameter.name
                uses.setdefault(source, []).append((stage, parameter.name))
                if parameter.tied_to is None:
                    self.names.append(parameter.name)
                    reporters.setdefault(plan.holders(stage)[0], []).append(parameter.name)
        self.by_reporter = {rank: tuple(names) for rank, names in reporters.items()}
        self.most_norms = max(map(len, self.by_reporter.values()), default=0)
        self.tied_uses = [tuple(where) for where in uses.values() if len(where) > 1]
        self.tied_names = {name for where in self.tied_uses for _, name in where}


class _RoutersByReporter:
    """Who reports the figures of which routers: the same on every worker."""

    def __init__(self, plan: Plan, skeleton: ModelSkeleton) -> None:
        counts = [
            sum(count_routers(skeleton.layers[i].buffers) for i in plan.stage_layers(stage))
            for stage in range(plan.num_stages)
        ]
        reporters: dict[int, list[int]] = {}
        for stage, count in enumerate(counts):
            if count:
                reporters.setdefault(plan.holders(stage)[0], []).append(stage)
        self.by_reporter = {rank: tuple(stages) for rank, stages in reporters.items()}
        self._counts = counts
        self.most_figures = NUM_FIGURES * max(
            (sum(counts[s] for s in stages) for stages in reporters.values()), default=0
        )

    def read(self, rows: Sequence[Sequence[float]], *, first: int) -> list[list[float]]:
        """Figures of each router in the order of stages, from all ranks' rows."""
        by_stage: dict[int, list[list[float]]] = {}
        for rank, stages in self.by_reporter.items():
            numbers = list(rows[rank][first:])
            for stage in stages:
                for _ in range(self._counts[stage]):
                    by_stage.setdefault(stage, []).append(numbers[:NUM_FIGURES])
                    del numbers[:NUM_FIGURES]
        return [figures for stage in sorted(by_stage) for figures in by_stage[stage]]


def _what_is_bad(
    losses: Sequence[float],
    norms: Mapping[str, float],
    names: Sequence[str],
    *,
    grad_norm: float,
    limit: float | None,
) -> str:
    bad_losses = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    bad_norms = [name for name in names if not math.isfinite(norms[name])]
    parts = []
    if bad_losses:
        parts.append(f"the loss of micro-batch {bad_losses[0]} is {losses[bad_losses[0]]}")
    if bad_norms:
        parts.append(f"the gradient of {bad_norms[0]} has norm {norms[bad_norms[0]]}")
        if len(bad_norms) > 1:
            parts[-1] += f" ({len(bad_norms)} of {len(names)} parameters are affected)"
    if not parts:
        largest = max(names, key=lambda name: norms[name])
        above = "" if limit is None else f", above faults.norm_limit ({limit:g})"
        parts.append(
            f"the gradient norm is {grad_norm:g}{above}; that of {largest} alone is "
            f"{norms[largest]:g}"
        )
    return " and ".join(parts)
