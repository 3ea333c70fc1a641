"""What one generation does on one worker: its steps, with evaluations, checkpoints, the faults that the
job's script asks for, and reports.

It is made anew with each generation, because all of it carries the generation's number; the layers are
those of `held_stages`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from deepopt.datasets.evaluation import evaluation_batches
from deepopt.datasets.read_ahead import ReadAhead
from deepopt.pipeline.step_result import StepResult, Wish
from deepopt.run_directory import RunDirectory
from deepopt.worker.bit_flip import flip_a_bit
from deepopt.worker.fault_script import FaultScript
from deepopt.worker.held_stages import HeldStages
from deepopt.worker.layer_checkpoint import LayerCheckpointer
from deepopt.worker.messages import Assignment, CheckpointFailed, RunEnded, ShardsWritten
from deepopt.worker.predictions import generation_folder
from deepopt.worker.step_reports import StepReports
from deepopt.worker.validation import Validation
from deepopt.worker.wishes import Wishes


class GenerationRun:
    """The run of one generation on one worker.

    Args:
        assignment: who the worker is in it, and what it shall do.
        held: its stages.
        run_directory: takes checkpoints and outputs.
        reports: of its steps.
        report: takes the messages of the checkpoint writer, from the writer's thread.
        wishes: what others asked of it.
        before: the run before under the same plan, which is over; None: there was none.

    Attributes:
        step: the step in work, or the last one.
        checkpointer: of this generation.
        validation: of this generation; None where the job has no validation set.

    Raises:
        InputError: the fault script names an operation that the worker does not have.
        TransportError: a peer is gone.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        held: HeldStages,
        run_directory: RunDirectory,
        reports: StepReports,
        report: Callable[[ShardsWritten | CheckpointFailed], None],
        wishes: Wishes,
        before: GenerationRun | None,
    ) -> None:
        self._assignment = assignment
        self._sender = assignment.sender
        self._job = assignment.job
        self._held = held
        self._pipeline = held.pipeline
        self._run_directory = run_directory
        self._reports = reports
        self._wishes = wishes
        self.step = assignment.start_step
        script = FaultScript(
            self._job.faults.inject,
            rank=self._sender.rank,
            generation=self._sender.generation,
            blows={"cut": self._cut, "flip": self._flip_a_bit},
        )
        script.check(self._pipeline.executor.program)
        self._fault_script = script
        self.validation: Validation | None = self._make_validation(
            None if before is None else before.validation
        )
        self._pipeline.executor.before_action = script if script else None
        self._pipeline.updates.before_update = self._before_update
        if before is not None:
            before.checkpointer.abandon()  # what it still writes is nobody's any more
        self.checkpointer: LayerCheckpointer = LayerCheckpointer(
            run_directory,
            job=self._job,
            plan=assignment.plan,
            sender=self._sender,
            optimizers=self._pipeline.optimizers,
            report=report,
        )
        if isinstance(held.batches, ReadAhead) and not self._job.evaluation.alone:
            order = self._pipeline.executor.microbatches_read()
            held.batches.expect(order, step=self.step + 1)

    @property
    def generation(self) -> int:
        """The number of the generation."""
        return self._sender.generation

    def catch_up(self, result_before: StepResult | None) -> None:
        """Do what the group before could not any more: the last step's report and checkpoint.

        Args:
            result_before: what that step came to, where another plan's worker in this process knows it;
                None elsewhere.

        Raises:
            TransportError: a peer is gone.
        """
        in_place = self._assignment.in_place
        if in_place is None or self._job.evaluation.alone:
            return
        scalars = self._evaluate_if_due() if in_place.report else {}
        if in_place.report and self._sender.rank == 0:
            result = result_before or self._held.result(self._assignment)
            self._reports.tell_step(
                self.step,
                result,
                tokens=self._tokens,
                step_time_s=result.times[0].step_s,
                scalars=scalars,
            )
        if in_place.save:
            self._save()

    def run(self) -> RunEnded:
        """Train until the last step or until somebody asked to stop.

        Raises:
            TransportError: a peer is gone.
            TrainingError: the model or the numbers failed.
        """
        if self._job.evaluation.alone:
            return self._only_evaluate()
        reason = "finished"
        keeper, ended = self._held.keeper, time.perf_counter()
        while self.step < self._assignment.last_step:
            self.step += 1
            result = self._pipeline.run(
                self.step, take_wishes=self._take_wishes, go_on=self._may_go_on()
            )
            self._wishes.settle()
            if keeper is not None and not result.wishes & Wish.BUSY:
                keeper.take(self.step)
            began, ended = ended, time.perf_counter()
            stop = bool(result.wishes & Wish.STOP)
            leave = bool(result.wishes & Wish.LEAVE) and not stop
            scalars = {} if stop else self._evaluate_if_due()
            self._reports.account(
                self.step,
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
            if leave and self.step < self._assignment.last_step:
                reason = "left"
                break
        self.checkpointer.wait()
        if reason != "left":
            self._end_readers()
        return RunEnded(
            sender=self._sender,
            step=self.step,
            reason=reason,
            op_times_s=self._reports.op_times_s(),
            parts_s=self._reports.parts_s(),
            overruns=self._pipeline.overruns,
            standing=self._held.standing(),
        )

    def move_store(self, host: str, port: int) -> None:
        """Meet the others in another store from now on.

        Args:
            host: IP address of the store.
            port: its port.
        """
        self._assignment = replace(self._assignment, store_host=host, store_port=port)

    def _only_evaluate(self) -> RunEnded:
        """One evaluation in the place of all steps."""
        assert self.validation is not None, "an evaluation without a validation set"
        self.step = self._assignment.last_step
        if self._job.evaluation.outputs:
            root = self._run_directory.predictions
            folder = generation_folder(root, self.generation)
            self.validation.write_outputs(folder, rank=self._sender.rank)
        else:
            self._reports.tell_evaluation(self.step, self.validation.run())
        self._end_readers()
        return RunEnded(
            sender=self._sender,
            step=self.step,
            reason="finished",
            op_times_s={},
            overruns=None,
        )

    def _make_validation(self, before: Validation | None) -> Validation | None:
        if not self._job.evaluation.is_wanted:
            return None
        batches = None if before is None else before.batches
        reader = None if before is None else before.reader
        if batches is None and self._held.batches is not None:
            root, count = self._run_directory.root, self._job.evaluation.readers
            batches = evaluation_batches(self._job, run_dir=root)
            if count:
                reader = ReadAhead(
                    batches, job=self._job, run_dir=root, readers=count, of="evaluation"
                )
        return Validation(
            self._job,
            pipeline=self._pipeline,
            transport=self._held.transport,
            batches=batches,
            reader=reader,
            last_step=self._assignment.last_step,
        )

    def _evaluate_if_due(self) -> dict[str, float]:
        """Figures of the validation set after the step done; none where it is not due."""
        if self.validation is None or not self.validation.is_due(self.step):
            return {}
        return self.validation.run()

    def _end_readers(self) -> None:
        """Nobody will ask for data any more."""
        reader = None if self.validation is None else self.validation.reader
        for one in (self._held.batches, reader):
            if isinstance(one, ReadAhead):
                one.close()

    def _take_wishes(self) -> Wish:
        self._fault_script(self.step, "EXCHANGE")
        wishes = self._wishes.take()
        if self._held.keeper is not None and self._held.keeper.busy:
            wishes |= Wish.BUSY
        # A stream's position cannot go back to the end of the step before.
        return wishes | Wish.WAIT if self._held.reads_stream else wishes

    def _may_go_on(self) -> bool:
        """Whether the next step may begin before this one is agreed on: nothing is saved between
        them."""
        evaluates = self.validation is not None and self.validation.is_due(self.step)
        saves = self._checkpoint_is_due(stop=False, asked=False)
        return self._job.pipeline.overlap_steps and not saves and not evaluates

    @property
    def _tokens(self) -> int:
        """Of a whole step; 0 where no batches are read."""
        if self._held.batches is None:
            return 0
        return self._held.batches.tokens_per_microbatch * self._assignment.plan.num_microbatches

    def _checkpoint_is_due(self, *, stop: bool, asked: bool) -> bool:
        every = self._job.checkpoint.every
        regular = every > 0 and self.step % every == 0
        return stop or asked or regular or self.step == self._assignment.last_step

    def _save(self) -> None:
        data_state = None
        if self._sender.rank == 0:
            assert self._held.batches is not None, "rank 0 holds the first stage"
            data_state = self._held.batches.state_dict()
        self._fault_script(self.step, "SAVE")
        self.checkpointer.save(self.step, data_state=data_state)

    def _before_update(self) -> None:
        if self._held.keeper is not None:
            self._held.keeper.wait_until_copied()
        self._fault_script(self.step, "UPDATE")

    def _cut(self) -> bool:
        self._held.transport.cut()
        return True

    def _flip_a_bit(self) -> bool:
        return flip_a_bit(o.layer for o in self._pipeline.optimizers.values())
