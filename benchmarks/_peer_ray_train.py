"""The peer of `recovery.py`: Ray Train's `TorchTrainer`, which starts its workers again after a failure.

As Ray's guides to distributed PyTorch and to fault tolerance write it: `prepare_model`
(DistributedDataParallel over gloo), `ray.train.report` with a checkpoint, `FailureConfig`, and
`get_checkpoint` at the start. Each worker takes its share of the micro-batches. Same model, initial values,
batches, optimizer, clipping and learning rates as a deepopt run of the same job. Rank 0 writes one JSON line
a step.

A report waits until Ray Train's controller has fetched the one before, which it does every two seconds as it
comes. Where every step has a checkpoint, that would be the step; so the controller looks every 0.1 s here, by
the variable that Ray Train documents for it. It also finds dead workers sooner so.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _peer_loop import build_model, data_parallel_step, make_optimizer, set_auxiliary_scale

from deepopt.cluster import ray_node
from deepopt.config import JobConfig
from deepopt.convert import find_loss
from deepopt.datasets.batch_source import build_batch_source
from deepopt.job_file import load_job

LOOK_EVERY_S = 0.1
STATE_FILE = "state.pt"


class ReplicatedLoop:
    """This rank's replica of the model, ready to train.

    Args:
        job: the job file of both sides.
    """

    def __init__(self, job: JobConfig) -> None:
        from ray.train.torch import prepare_model

        self._job = job
        self._batches = build_batch_source(job, run_dir=None)
        plain = build_model(job)
        self._loss = find_loss(job, plain)
        self._own = range(dist.get_rank(), job.training.microbatches, dist.get_world_size())
        set_auxiliary_scale(plain, 1.0 / len(self._own))
        self._plain = plain
        # Experts that got no token have no gradient.
        self._model = prepare_model(
            plain, parallel_strategy_kwargs={"find_unused_parameters": True}
        )
        self._optimizer = make_optimizer(plain.parameters(), job.optimizer)

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
            apart=self._model.no_sync,  # gradients travel once a step, with the last micro-batch
        )

    def save(self, step: int, folder: Path) -> None:
        """Write model and optimizer into a folder."""
        state = {
            "step": step,
            "model": self._plain.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> int:
        """Take up what `save` wrote.

        Returns:
            Its step.
        """
        state = torch.load(folder / STATE_FILE)
        self._plain.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def train(config: dict[str, Any]) -> None:
    """What each worker runs, from the newest checkpoint on.

    Args:
        config: `job`, `out`: paths; `steps`, `every`: as the options of this script.
    """
    import ray.train

    job, out = load_job(Path(config["job"]), []), Path(config["out"])
    torch.set_num_threads(job.worker.threads)
    rank = ray.train.get_context().get_world_rank()
    # Ray names its processes itself; whoever wants to kill one finds it here.
    out.with_suffix(f".rank{rank}").write_text(str(os.getpid()))
    loop, done = ReplicatedLoop(job), 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            done = loop.load(Path(folder))
    lines = None
    restart = 0
    if rank == 0:
        before = out.read_text().splitlines() if out.exists() else []
        restart = json.loads(before[-1])["restart"] + 1 if before else 0
        lines = out.open("a", buffering=1)
    ended = time.perf_counter()
    for step in range(done + 1, config["steps"] + 1):
        loss = loop.step(step)
        if step % config["every"] == 0:
            # Beside what it writes anyway: a worker that is killed meanwhile removes nothing itself.
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:
                saved = None
                if rank == 0:
                    loop.save(step, Path(folder))
                    saved = ray.train.Checkpoint.from_directory(folder)
                ray.train.report({"loss": loss}, checkpoint=saved)
        began, ended = ended, time.perf_counter()
        if lines is not None:
            record = {
                "step": step,
                "loss": loss,
                "step_time_s": ended - began,
                "restart": restart,
            }
            lines.write(json.dumps(record) + "\n")


def main() -> None:
    """Train a job and write a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=Path, required=True, help="job file")
    parser.add_argument("--workers", type=int, required=True, help="number of workers")
    parser.add_argument("--steps", type=int, required=True, help="steps to train")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a step")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder")
    parser.add_argument("--every", type=int, default=1, help="steps between checkpoints [1]")
    arguments = parser.parse_args()
    job = load_job(arguments.job, [])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as deepopt's workers on one host
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(LOOK_EVERY_S))
    ray_node.prepare_environment(
        threads=job.worker.threads, token=ray_node.make_token(), loopback=True
    )
    temp_dir = ray_node.make_temp_dir()
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    import ray

    ray.init(
        num_cpus=arguments.workers,
        include_dashboard=False,
        _temp_dir=str(temp_dir),
        _node_ip_address=ray_node.LOOPBACK,
    )
    config = {
        "job": str(arguments.job.resolve()),  # workers run in another folder
        "out": str(arguments.out.resolve()),
        "steps": arguments.steps,
        "every": arguments.every,
    }
    try:
        TorchTrainer(
            train,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=arguments.workers),
            run_config=RunConfig(
                storage_path=str(arguments.checkpoints.resolve()),
                name="recovery",
                failure_config=FailureConfig(max_failures=-1),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        ).fit()
    finally:
        ray.shutdown()
        ray_node.remove_temp_dir(temp_dir)


if __name__ == "__main__":
    main()
