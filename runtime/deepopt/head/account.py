"""The account of what workers have done: steps, tokens, expert loads, checkpoints."""

from __future__ import annotations

from deepopt.clock import utc_now
from deepopt.head.commits import Committed, NotCommitted
from deepopt.head.generation import Generation
from deepopt.head.journal import replay
from deepopt.head.measures import COUNTS_KEPT, RECENT_STEPS, figures_of, metrics_line
from deepopt.head.prediction_report import prediction_error
from deepopt.head.record import JobRecord
from deepopt.telemetry import events
from deepopt.telemetry.files import read_json_lines
from deepopt.worker.messages import ExpertLoads, StepReport


class Account:
    """Keeps the progress in a job's record.

    Args:
        record: of the job.
    """

    def __init__(self, record: JobRecord) -> None:
        self._record = record

    def take_step(self, generation: Generation, report: StepReport) -> None:
        """Take the report of a step that all have done."""
        progress = self._record.progress
        if generation.adopted and report.step <= progress.step:
            return  # told to the head before
        figures = figures_of(
            report,
            forward_flops_per_token=self._record.skeleton.forward_flops_per_token,
            peak_flops=generation.peak_flops(),
        )
        self._count_tokens(report.step, report.tokens)
        self._record.pace.add(report, figures)
        progress.step = progress.reported = report.step
        progress.report, progress.figures = report, figures
        progress.prediction_error = prediction_error(
            self._record.prediction,
            self._record.pace.step_s[-RECENT_STEPS:],
            warm_up=self._record.pace.warm_up[-RECENT_STEPS:],
        )
        progress.warm_up_share = self._record.pace.warm_up[-1]
        progress.time_left_s = self._record.pace.time_left_s(
            self._record.identity.last_step - report.step
        )
        generation.liveness.note_step(report.step_time_s)
        fault = self._record.faults.open
        if fault is not None and fault.ready_s is not None and report.step > fault.step_done:
            fault.done_s = self._record.clock.monotonic_s()
            self._record.close_fault("recovered")
        generation.gets_on = self._record.faults.open is None
        self._record.board.step(report.step, metrics_line(report, figures, time=utc_now()))

    def take_expert_loads(self, message: ExpertLoads) -> None:
        """Take the loads of a window of steps."""
        for layer, loads in message.loads:
            self._record.load_forecast.add(
                layer, loads, first_step=message.first_step, step=message.step
            )
        self._record.board.expert_loads(
            {
                "first_step": message.first_step,
                "step": message.step,
                "loads": dict(message.loads),
                "forecast_error": self._record.load_forecast.errors(),
            }
        )

    def take_commits(self, outcomes: list[Committed | NotCommitted]) -> None:
        """Take what became of checkpoints."""
        for outcome in outcomes:
            if isinstance(outcome, NotCommitted):
                self._record.board.tell(
                    events.CheckpointWasNotWritten(
                        step=outcome.step, reason=outcome.reason, rank=outcome.rank
                    )
                )
                continue
            self._record.note("checkpoint", step=outcome.step, path=str(outcome.path))
            self._record.board.tell(
                events.CheckpointCommitted(
                    step=outcome.step, path=str(outcome.path), size_bytes=outcome.size_bytes
                )
            )
            if outcome.warning:
                self._record.warn(outcome.warning)
            self._record.progress.checkpoint_step = outcome.step
            self._record.progress.checkpoint_path = str(outcome.path)

    def recall(self) -> None:
        """What the figures on disk and the journal say of the progress under an earlier head."""
        history, progress = replay(self._record.journal.entries), self._record.progress
        progress.checkpoint_step = history.checkpoint_step
        progress.checkpoint_path = history.checkpoint_path
        for line in read_json_lines(self._record.run.metrics):
            step = int(line["step"])
            self._count_tokens(step, int(line["tokens"]))
            progress.step = progress.reported = step

    def _count_tokens(self, step: int, tokens: int) -> None:
        seen = self._record.tokens_seen
        before = seen.get(step - 1)
        seen[step] = None if before is None else before + tokens
        # Nobody goes back so far but to a checkpoint, which has its own count.
        seen.pop(step - COUNTS_KEPT, None)
