"""A stage worker without a model: steps that only take time, for tests of processes and head.

`model.kwargs` of the job says what it does: `step_s` (seconds a step), `crash_at` (a step at which
the process dies by a segmentation fault). `faults.inject` works as in a real one. Ranks do not wait
for each other, so checkpoints and clean stops are for jobs of one worker.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepopt.config import JobConfig
from deepopt.errors import DeepoptError, TransportError
from deepopt.run_directory import RunDirectory
from deepopt.schedule.ir import Action, Op
from deepopt.worker.fault_script import FaultScript
from deepopt.worker.messages import (
    Assignment,
    Failure,
    Heartbeat,
    RunEnded,
    ShardsWritten,
    StepReport,
    WorkerReady,
    WorkerTimes,
)


class FakeStageWorker:
    """As `StageWorker`, see there."""

    def __init__(
        self,
        assignment: Assignment,
        *,
        report: Callable[[Any], None],
        warmth: None = None,
        before: None = None,
    ) -> None:
        self._assignment = assignment
        self._sender = assignment.sender
        self._report = report
        self._step = assignment.start_step
        self._progress = 0
        self._stop = False
        kwargs = assignment.job.model.kwargs
        self._step_s = float(kwargs.get("step_s", 0.05))  # type: ignore[arg-type]
        self._crash_at = kwargs.get("crash_at")

        self.can_go_on = False  # it cannot go on in another generation

        self._interrupted = False

    @staticmethod
    def warm(job: JobConfig, run_dir: Path, *, builds: bool) -> None:
        """Nothing takes long here."""

    def interrupt(self, generation: int) -> None:
        if generation >= self._sender.generation:
            self._interrupted = True

    def let_go(self) -> None:
        """It holds nobody up."""

    def setup(self) -> WorkerReady:
        print("set up", os.getpid(), flush=True)  # noqa: T201 - the log must have it
        return WorkerReady(
            sender=self._sender,
            pid=os.getpid(),
            host=socket.gethostname(),
            stages=self._assignment.plan.held_stages(self._sender.rank),
            device="cpu",
            setup_s={"build": 0.0},
            peak_flops=0.0,
            peak_source="job",
        )

    def run(self) -> RunEnded:
        script = FaultScript(
            self._assignment.job.faults.inject,
            rank=self._sender.rank,
            generation=self._sender.generation,
        )
        reason = "finished"
        while self._step < self._assignment.last_step:
            self._step += 1
            script(self._step, Action(self._sender.rank, Op.F, 0))
            if self._crash_at == self._step:
                ctypes.string_at(0)
            time.sleep(self._step_s)
            if self._interrupted:
                raise TransportError("interrupted")
            self._progress += 1
            if self._sender.rank == 0:
                self._report(self._step_report())
            if self._stop:
                reason = "stopped"
                break
        if self._assignment.plan.world_size == 1:
            self._report(self._checkpoint())
        return RunEnded(sender=self._sender, step=self._step, reason=reason)

    def move_store(self, host: str, port: int) -> None:
        """Nothing is met there."""

    def request_stop(self) -> None:
        self._stop = True

    def request_checkpoint(self) -> None:
        self._report(self._checkpoint())

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            sender=self._sender,
            step=self._step,
            progress=self._progress,
            action=f"{self._sender.rank}F0",
        )

    def describe_failure(self, error: BaseException) -> Failure:
        return Failure(
            sender=self._sender,
            kind="peer" if isinstance(error, TransportError) else "error",
            step=self._step,
            action=f"{self._sender.rank}F0",
            message=error.message if isinstance(error, DeepoptError) else repr(error),
            traceback="".join(traceback.format_exception(error)),
            exit_code=error.exit_code if isinstance(error, DeepoptError) else 5,
            pid=os.getpid(),
            host=socket.gethostname(),
        )

    def export(self, checkpoint_dir: str) -> str:
        final = RunDirectory(Path(self._assignment.run_dir)).final
        final.mkdir(exist_ok=True)
        (final / "from").write_text(Path(checkpoint_dir).name)
        return str(final)

    def close(self) -> None:
        """Nothing is open."""

    def _checkpoint(self) -> ShardsWritten:
        import torch  # here, because most tests write no checkpoint and start faster without

        from deepopt.checkpoint.layer_state import LayerState
        from deepopt.checkpoint.store import CheckpointStore

        run = RunDirectory(Path(self._assignment.run_dir))
        store = CheckpointStore(run.checkpoints)
        generation = self._sender.generation
        store.begin(self._step, generation)
        shards = tuple(
            store.write_layer(
                self._step,
                generation,
                LayerState(layer=name, tensors={f"parameter/{name}.weight": torch.zeros(4)}),
                self._sender.rank,
            )
            for name in self._assignment.plan.layer_names
        )
        return ShardsWritten(sender=self._sender, step=self._step, shards=shards)

    def _step_report(self) -> StepReport:
        return StepReport(
            sender=self._sender,
            step=self._step,
            loss=1.0 / self._step,
            grad_norm=1.0,
            learning_rate=1e-3,
            tokens=100,
            step_time_s=self._step_s,
            workers=tuple(
                WorkerTimes(
                    rank=rank,
                    step_s=self._step_s,
                    compute_s=self._step_s / 2,
                    wait_s=0.0,
                    send_s=0.0,
                    reduce_s=0.0,
                    update_s=0.0,
                )
                for rank in range(self._assignment.plan.world_size)
            ),
        )
