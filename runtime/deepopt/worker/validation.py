"""A job's validation set on one worker of one generation: when it is due, and what it gave."""

from __future__ import annotations

from deepopt.config import JobConfig
from deepopt.datasets.evaluation import EvaluationBatches
from deepopt.pipeline.evaluation import Evaluator
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import Transport


class Validation:
    """Evaluations between the steps of a job.

    Args:
        job: has a validation set.
        pipeline: the layers of this worker.
        transport: to the other workers; all make their validation at the same point.
        batches: of the validation set; None where neither the first nor the last stage is held.
        last_step: of the job.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        pipeline: PipelineStep,
        transport: Transport,
        batches: EvaluationBatches | None,
        last_step: int,
    ) -> None:
        self._every = job.evaluation.every
        self._last_step = last_step
        self.batches = batches
        # Those in the middle never see the data.
        own = 0 if batches is None else batches.num_microbatches
        counts = transport.start_all_gather([float(own)]).wait()
        count = int(max(row[0] for row in counts))
        self.evaluator: Evaluator = pipeline.make_evaluator(batches, num_microbatches=count)

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        regular = self._every > 0 and step % self._every == 0
        return regular or step == self._last_step

    def run(self) -> dict[str, float]:
        """Evaluate; the figures for the step's report.

        Raises:
            TransportError: a peer is gone.
        """
        evaluation = self.evaluator.run()
        assert evaluation.loss is not None, "a validation computes losses"
        return {"val_loss": evaluation.loss, "val_time_s": evaluation.time_s}
