"""What a worker tells of its steps: to the head, to its log, and to the trace of chosen steps.

Rank 0 reports the step; every worker reports what only it knows. It changes nothing in training.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Mapping

from deepopt.config import JobConfig
from deepopt.pipeline.spans import Span
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import StepResult
from deepopt.run_directory import RunDirectory
from deepopt.schedule.ir import COMPUTE_OPS
from deepopt.telemetry.trace import write_trace
from deepopt.worker.layer_ways import LayerWays
from deepopt.worker.load_window import LoadWindow
from deepopt.worker.messages import (
    BadStep,
    ExpertLoads,
    Sender,
    StepReport,
    WeightWork,
    WorkerTimes,
)
from deepopt.worker.step_parts import StepParts

logger = logging.getLogger(__name__)

_TIMES_KEPT = 1000  # of each operation, the newest: the median of a run without end
_WARM_UP_STEPS = 2  # left out of the measured times of operations: caches and allocators fill


class StepReports:
    """The reports of one worker, in one generation after the other.

    Args:
        job: the resolved job.
        run_directory: takes traces.
        report: takes messages for the head.
        sender: who this worker is.
        start_step: the step after which it begins.

    Attributes:
        layer_ways: of the worker's layers; set when they are built.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        run_directory: RunDirectory,
        report: Callable[[StepReport | WeightWork | ExpertLoads | BadStep], None],
        sender: Sender,
        start_step: int,
    ) -> None:
        self._job = job
        self._run_directory = run_directory
        self._report = report
        self._sender = sender
        self._start_step = start_step
        self._parts = StepParts()
        self._busy_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_TIMES_KEPT))
        self._told_weight_work = False
        self.layer_ways: LayerWays | None = None
        self._load_window = LoadWindow(job.elb.monitor_freq)

    def begin(self, sender: Sender, *, start_step: int) -> None:
        """Go on in another generation.

        Args:
            sender: who this worker is in it.
            start_step: the step after which it begins.
        """
        self._sender, self._start_step = sender, start_step

    def op_times_s(self) -> dict[str, float]:
        """Median busy seconds of the operations here, by stage and operation: `2F`."""
        return {name: statistics.median(times) for name, times in self._busy_s.items()}

    def parts_s(self) -> dict[str, float]:
        """Median seconds of the parts of a step, by name."""
        return self._parts.medians()

    def account(
        self,
        step: int,
        result: StepResult,
        *,
        pipeline: PipelineStep,
        tokens: int,
        step_time_s: float,
        scalars: Mapping[str, float],
    ) -> None:
        """Take note of a step and tell what is to be told of it.

        Args:
            step: the step.
            result: what it came to.
            pipeline: that made it.
            tokens: of the whole step; 0 where nobody knows, on other ranks than 0.
            step_time_s: wall time from the end of the step before.
            scalars: further figures for the report.
        """
        if step - self._start_step > _WARM_UP_STEPS:
            for span in result.spans:
                if span.action.op in COMPUTE_OPS:
                    name = f"{span.action.stage}{span.action.op}"
                    self._busy_s[name].append(span.busy_ns * 1e-9)
            self._parts.add(result.spans, parts_s=pipeline.parts_s)
        else:
            self._parts.skip()
        if step in self._job.logging.trace_steps:
            self._write_trace(step, result.spans)
        if not self._told_weight_work:
            self._told_weight_work = True
            self._report_weight_work(pipeline)
        if self._sender.rank == 0:
            if result.bad is not None:
                what, skipped = result.bad.what, result.skipped
                self._report(
                    BadStep(sender=self._sender, step=step, what=what, skipped=skipped)
                )
            self.tell_step(
                step, result, tokens=tokens, step_time_s=step_time_s, scalars=scalars
            )
        window = self._load_window.add(step, result.expert_loads)
        if window is not None:
            self._report(
                ExpertLoads(
                    sender=self._sender,
                    first_step=window.first_step,
                    step=window.step,
                    loads=window.loads,
                )
            )

    def tell_step(
        self,
        step: int,
        result: StepResult,
        *,
        tokens: int,
        step_time_s: float,
        scalars: Mapping[str, float],
    ) -> None:
        """Report a step to the head; arguments as for `account`."""
        self._report(
            StepReport(
                sender=self._sender,
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                tokens=tokens,
                step_time_s=step_time_s,
                workers=tuple(
                    WorkerTimes(
                        rank=rank,
                        step_s=times.step_s,
                        compute_s=times.compute_s,
                        wait_s=times.wait_s,
                        send_s=times.send_s,
                        reduce_s=times.reduce_s,
                        update_s=times.update_s,
                    )
                    for rank, times in enumerate(result.times)
                ),
                scalars={**scalars, **result.experts, **self._overlap_scalars(result)},
            )
        )

    def tell_evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report an evaluation that stands in the place of all steps.

        Args:
            step: the last step before it.
            scalars: its figures.
        """
        if self._sender.rank == 0:
            self._report(
                StepReport(
                    sender=self._sender,
                    step=step,
                    loss=scalars["val_loss"],
                    grad_norm=0.0,
                    learning_rate=0.0,
                    tokens=0,
                    step_time_s=scalars["val_time_s"],
                    workers=(),
                    scalars=scalars,
                )
            )

    def _report_weight_work(self, pipeline: PipelineStep) -> None:
        notes, ways = pipeline.weight_notes(), pipeline.weight_ways()
        for note in notes:
            logger.info("weight gradients of %s", note)
        if ways:
            assert self.layer_ways is not None, "ways of layers before they are built"
            self._report(
                WeightWork(
                    sender=self._sender,
                    notes=tuple(notes),
                    conditions=self.layer_ways.conditions,
                    ways=self.layer_ways.signed(ways),
                )
            )

    def _overlap_scalars(self, result: StepResult) -> dict[str, float]:
        if not self._job.pipeline.overlap_steps:
            return {}
        return {
            "ran_ahead": float(result.ran_ahead),
            "rolled_back": float(result.rolled_back),
        }

    def _write_trace(self, step: int, spans: list[Span]) -> None:
        path = self._run_directory.traces / f"step-{step}.rank-{self._sender.rank}.json"
        write_trace(path, rank=self._sender.rank, spans=spans)
