"""The peer of `recovery.py`: FSDP2 with torch's distributed checkpoints, by `torchrun --max-restarts`.

One process a rank, gloo, data-parallel: each rank takes its share of the micro-batches. Same model, initial
values, batches, optimizer, clipping and learning rates as a deepopt run of the same job. After a restart all
ranks load the newest checkpoint that was written whole. Rank 0 writes one JSON line a step.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _peer_loop import build_model, data_parallel_step, make_optimizer, set_auxiliary_scale
from _peer_pipelining import join_group
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from deepopt.config import JobConfig
from deepopt.convert import find_loss
from deepopt.datasets.batch_source import build_batch_source
from deepopt.job_file import load_job


class ShardedLoop:
    """This rank's shards of the model, ready to train.

    Args:
        job: the job file of both sides.
    """

    def __init__(self, job: JobConfig) -> None:
        self._job = job
        self._batches = build_batch_source(job, run_dir=None)
        self._model = build_model(job)
        self._loss = find_loss(job, self._model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for child in self._model.children():
            for block in child if isinstance(child, torch.nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(self._model, mesh=mesh)
        self._optimizer = make_optimizer(self._model.parameters(), job.optimizer)
        self._own = range(dist.get_rank(), job.training.microbatches, dist.get_world_size())
        set_auxiliary_scale(self._model, 1.0 / len(self._own))

    def step(self, step: int) -> float:
        """Train one step.

        Args:
            step: 1-based.

        Returns:
            Mean loss over all ranks.
        """
        return data_parallel_step(
            self._model,
            step=step,
            job=self._job,
            batches=self._batches,
            loss=self._loss,
            optimizer=self._optimizer,
            own=self._own,
        )

    def save(self, step: int, folder: Path) -> None:
        """Write a checkpoint; it counts once its metadata is there."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / str(step))

    def load(self, folder: Path) -> int:
        """Load the newest whole checkpoint.

        Returns:
            Its step; 0 without one.
        """
        step = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
        if step:
            model, optimizer = get_state_dict(self._model, self._optimizer)
            state = {"model": model, "optimizer": optimizer}
            dcp.load(state, checkpoint_id=folder / str(step))
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        return step


def main() -> None:
    """Train a job and write a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=Path, required=True, help="job file")
    parser.add_argument("--steps", type=int, required=True, help="steps to train")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a step")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    arguments = parser.parse_args()
    job = load_job(arguments.job, [])
    torch.set_num_threads(job.worker.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as deepopt's workers on one host
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    join_group(restart)
    loop = ShardedLoop(job)
    done = loop.load(arguments.checkpoints)
    out = arguments.out.open("a", buffering=1) if dist.get_rank() == 0 else None
    ended = time.perf_counter()
    for step in range(done + 1, arguments.steps + 1):
        loss = loop.step(step)
        if step % arguments.every == 0:
            loop.save(step, arguments.checkpoints)
        began, ended = ended, time.perf_counter()
        if out is not None:
            record = {
                "step": step,
                "loss": loss,
                "step_time_s": ended - began,
                "restart": restart,
            }
            out.write(json.dumps(record) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
