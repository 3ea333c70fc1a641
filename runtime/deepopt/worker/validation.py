"""A job's validation set on one worker of one generation: when it is due, and what it gave."""

from __future__ import annotations

from pathlib import Path

from deepopt.config import JobConfig
from deepopt.datasets.evaluation import EvaluationBatches
from deepopt.datasets.read_ahead import ReadAhead
from deepopt.pipeline.evaluation import Evaluator
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import Transport
from deepopt.worker.predictions import OutputWriter, make_cut


class Validation:
    """Evaluations between the steps of a job.

    Args:
        job: has a validation set.
        pipeline: the layers of this worker.
        transport: to the other workers; all make their validation at the same point.
        batches: of the validation set; None where neither the first nor the last stage is held.
        last_step: of the job.
        reader: reads `batches` ahead; None: they are read when they are asked for.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        pipeline: PipelineStep,
        transport: Transport,
        batches: EvaluationBatches | None,
        last_step: int,
        reader: ReadAhead | None = None,
    ) -> None:
        self._every = job.evaluation.every
        self._last_step = last_step
        self.batches = batches
        self.reader = reader
        # Those in the middle never see the data.
        own = (0, 0) if batches is None else (batches.num_microbatches, batches.last_size)
        counts = transport.start_all_gather([*map(float, own)]).wait()
        self._count, left = (int(max(row[part] for row in counts)) for part in (0, 1))
        self._size = job.training.microbatch_size
        self._samples = [self._size] * (self._count - 1) + [left]
        self._cut = None
        if left != self._size:
            self._cut = make_cut(
                last=self._count - 1,
                size=self._size,
                left=left,
                own_loss_counts=job.model.loss is None,
            )
        self.evaluator: Evaluator = pipeline.make_evaluator(
            reader or batches, num_microbatches=self._count
        )
        if job.evaluation.alone:  # it is all there is to do
            self._read_ahead()

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after a step."""
        regular = self._every > 0 and step % self._every == 0
        return regular or step == self._last_step

    def run(self) -> dict[str, float]:
        """Evaluate; the figures for the step's report.

        Raises:
            TransportError: a peer is gone.
        """
        self._read_ahead()
        evaluation = self.evaluator.run(cut=self._cut, samples=self._samples)
        assert evaluation.loss is not None, "a validation computes losses"
        return {"val_loss": evaluation.loss, "val_time_s": evaluation.time_s}

    def write_outputs(self, folder: Path, *, rank: int) -> None:
        """Write the model's outputs, those of this worker's micro-batches; no losses.

        Args:
            folder: of this generation.
            rank: of this worker.

        Raises:
            TransportError: a peer is gone.
            CheckpointError: they cannot be written.
        """
        writer = OutputWriter(
            folder, rank=rank, size=self._size, samples=lambda number: self._samples[number]
        )
        self._read_ahead()
        self.evaluator.run(take_output=writer.take)
        writer.flush()

    def _read_ahead(self) -> None:
        if self.reader is not None:
            order = self.evaluator.executor.microbatches_read()
            self.reader.expect(order, step=1, repeats=False)
