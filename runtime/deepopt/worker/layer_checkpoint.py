"""What one worker writes into a checkpoint and reads from it: its layers, keyed by name.

A layer held by several workers is written by one of them; a tied parameter is written where it
is first used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepopt.checkpoint.layer_files import read_keys, read_layer, read_manifest
from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import Manifest, ShardEntry
from deepopt.checkpoint.store import CheckpointStore
from deepopt.checkpoint.writer import CheckpointWriter
from deepopt.config import JobConfig
from deepopt.errors import CheckpointError
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.planner.plan import Plan
from deepopt.run_directory import RunDirectory
from deepopt.worker.messages import CheckpointFailed, Sender, ShardsWritten

logger = logging.getLogger(__name__)


class LayerCheckpointer:
    """Saves and loads the layers of one worker.

    Args:
        run: the run directory.
        job: says where checkpoints go.
        plan: says who holds which layer.
        sender: this worker.
        optimizers: state of each held layer, by layer name.
        report: takes the outcome of each checkpoint; called on the writer's thread.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        job: JobConfig,
        plan: Plan,
        sender: Sender,
        optimizers: Mapping[str, LayerOptimizer],
        report: Callable[[ShardsWritten | CheckpointFailed], None],
    ) -> None:
        self._sender = sender
        self._optimizers = optimizers
        self._report = report
        self._timeout_s = job.checkpoint.timeout_s
        self._data_states: dict[int, Mapping[str, Any] | None] = {}
        self._lock = threading.Lock()
        self._written = [
            plan.layer_names[index]
            for stage in plan.held_stages(sender.rank)
            for index in plan.stage_layers(stage)
            if _writer_of(plan, stage, index) == sender.rank
        ]
        self._writer = CheckpointWriter(
            CheckpointStore(
                run.checkpoint_root(job.checkpoint.directory), keep=job.checkpoint.keep
            ),
            writer_rank=sender.rank,
            on_written=self._on_written,
            on_failed=self._on_failed,
        )

    def save(self, step: int, *, data_state: Mapping[str, Any] | None) -> None:
        """Take a snapshot and write it in the background; waits only for the checkpoint before.

        Args:
            step: steps done.
            data_state: state of a stream source after the step; None for others.
        """
        if not self._writer.wait_idle(self._timeout_s):
            self._on_failed(
                step, f"the checkpoint before is still being written after {self._timeout_s} s"
            )
            return
        states = [self._snapshot(self._optimizers[name]) for name in self._written]
        with self._lock:
            self._data_states[step] = data_state
        self._writer.submit(step, self._sender.generation, states)

    def load(self, checkpoint: Path) -> dict[str, Any] | None:
        """Load this worker's layers from a committed checkpoint.

        Returns:
            The state of a stream source; None for others.

        Raises:
            CheckpointError: a shard is damaged, or the model's layers are others.
        """
        manifest = read_manifest(checkpoint)
        for name, optimizer in self._optimizers.items():
            try:
                state = read_layer(checkpoint, manifest=manifest, layer=name)
                tensors = dict(state.tensors) | _tied_tensors(checkpoint, manifest, optimizer)
                optimizer.load_state(tensors)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{checkpoint}: layer {name}: {error.message}", remedy=error.remedy
                ) from error
        return manifest.data_state

    def wait(self) -> None:
        """Wait for the checkpoint in work, at most `checkpoint.timeout_s`."""
        if not self._writer.wait_idle(self._timeout_s):
            logger.warning("the last checkpoint is not written after %s s", self._timeout_s)

    def close(self) -> None:
        """End the writer's thread."""
        self._writer.close()

    def abandon(self) -> None:
        """End the writer's thread when it is done with the file in work, without waiting for it."""
        self._writer.close(timeout_s=0.0)

    def _snapshot(self, optimizer: LayerOptimizer) -> LayerState:
        tied = optimizer.layer.tied
        tensors = {
            key: tensor.detach().to("cpu", copy=True)
            for key, tensor in optimizer.export_state().items()
            if key.split("/")[1] not in tied
        }
        if any(t.device.type == "cuda" for t in optimizer.layer.parameters.values()):
            torch.cuda.synchronize()
        return LayerState(layer=optimizer.layer.name, tensors=tensors)

    def _on_written(self, step: int, shards: tuple[ShardEntry, ...]) -> None:
        with self._lock:
            data_state = self._data_states.pop(step, None)
        self._report(
            ShardsWritten(sender=self._sender, step=step, shards=shards, data_state=data_state)
        )

    def _on_failed(self, step: int, reason: str) -> None:
        logger.warning("checkpoint of step %d failed: %s", step, reason)
        with self._lock:
            self._data_states.pop(step, None)
        self._report(CheckpointFailed(sender=self._sender, step=step, reason=reason))


def _writer_of(plan: Plan, stage: int, layer_index: int) -> int:
    """The holder that writes a layer: in turn, so that copies share the work."""
    holders = plan.holders(stage)
    return holders[layer_index % len(holders)]


def _tied_tensors(
    checkpoint: Path, manifest: Manifest, optimizer: LayerOptimizer
) -> dict[str, torch.Tensor]:
    """The state of tied parameters from where they are first used, under this layer's names."""
    renamed = {}
    for name, source in optimizer.layer.tied.items():
        keys = [
            key
            for shard in manifest.shards
            for key in shard.tensors
            if key == f"parameter/{source}" or key.startswith(f"optimizer/{source}/")
        ]
        found = read_keys(checkpoint, manifest=manifest, keys=keys)
        for key, tensor in found.items():
            prefix, _, rest = key.partition(f"/{source}")
            renamed[f"{prefix}/{name}{rest}"] = tensor
    return renamed
