"""The peer of `throughput.py`, `startup.py`, `recovery.py`: torch.distributed.pipelining, by torchrun.

One process a rank, gloo, the schedule classes as torch ships them. Same model, initial values, cuts, batches,
optimizer, global-norm clipping and learning rates as a deepopt run of the same job. It trains untied
weights only: a user of torch would have to sum tied gradients over ranks by hand, which would
    measure that code.
Rank 0 writes one JSON line a step; a step ends after the update, with loss and norm known on every rank.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from _peer_loop import make_optimizer, set_auxiliary_scale
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.job_file import load_job
from deepopt.pipeline.learning_rate import learning_rate
from deepopt.planner.decide import make_plan
from deepopt.planner.plan import Plan

# Schedule of the peer -> (placement, schedule) by which deepopt's planner cuts the model into as many stages.
CUTS = {"1f1b": ("line", "1f1b"), "dual_pipe_v": ("v", "dual_pipe_v")}


class PipelinedLoop:
    """This rank's stages, ready to train.

    Args:
        job: the job file of both sides.
        schedule: a key of `CUTS`.
    """

    def __init__(self, job: JobConfig, schedule: str) -> None:
        self._job = job
        self._rank, ranks = dist.get_rank(), dist.get_world_size()
        self._plan = _plan(job, schedule, ranks)
        self._batches = build_batch_source(job, run_dir=None)
        held = self._plan.held_stages(self._rank)
        self._is_first = 0 in held
        self._is_last = self._plan.num_stages - 1 in held
        stages = []
        parameters: list[torch.nn.Parameter] = []
        loss_function = None
        for index in held:
            layers, loss_function = build_layers(
                job, self._plan.stage_layers(index), device=torch.device("cpu")
            )
            module = torch.nn.Sequential(*(layer.module for layer in layers))
            # The schedule divides all gradients by the number of micro-batches afterwards.
            set_auxiliary_scale(module, 1.0)
            parameters += module.parameters()
            stages.append(
                PipelineStage(module, index, self._plan.num_stages, torch.device("cpu"))
            )
        self._parameters = parameters
        self._optimizer = make_optimizer(parameters, job.optimizer)
        microbatches = job.training.microbatches
        self._schedule: Schedule1F1B | ScheduleDualPipeV
        if schedule == "1f1b":
            self._schedule = Schedule1F1B(stages[0], microbatches, loss_fn=loss_function)
        else:
            self._schedule = ScheduleDualPipeV(
                list(stages), microbatches, loss_fn=loss_function
            )

    def step(self, step: int) -> tuple[float, float]:
        """Train one step.

        Args:
            step: 1-based.

        Returns:
            (mean loss, global gradient norm before clipping), on every rank.
        """
        self._optimizer.zero_grad()
        inputs, targets = self._whole_batch(step)
        losses: list[torch.Tensor] = []
        arguments = () if inputs is None else (inputs,)
        self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        loss, norm = self._exchange(losses)
        grad_clip = self._job.training.grad_clip
        if grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, grad_clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._job.optimizer)
        self._optimizer.step()
        return loss, norm.item()

    def save(self, step: int, folder: Path) -> None:
        """Write this rank's part of a checkpoint; it counts once all ranks have renamed theirs."""
        path = folder / f"{step}-{self._rank}.pt"
        state = {
            "parameters": [p.detach() for p in self._parameters],
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)

    def load(self, folder: Path) -> int:
        """Load the newest checkpoint that all ranks have written.

        Returns:
            Its step; 0 without one.
        """
        ranks: dict[int, int] = {}
        for path in folder.glob("*.pt"):
            number = int(path.stem.partition("-")[0])
            ranks[number] = ranks.get(number, 0) + 1
        step = max(
            (n for n, count in ranks.items() if count == dist.get_world_size()), default=0
        )
        if step:
            state = torch.load(folder / f"{step}-{self._rank}.pt")
            with torch.no_grad():
                for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                    parameter.copy_(value)
            self._optimizer.load_state_dict(state["optimizer"])
        return step

    def _whole_batch(self, step: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The inputs where the first stage is, the targets where the last one is."""
        if not (self._is_first or self._is_last):
            return None, None
        pairs = [
            self._batches.batch(step, microbatch)
            for microbatch in range(self._job.training.microbatches)
        ]
        inputs = torch.cat([pair[0] for pair in pairs]) if self._is_first else None
        targets = torch.cat([pair[1] for pair in pairs]) if self._is_last else None
        return inputs, targets

    def _exchange(self, losses: list[torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Mean loss and global norm from one all-reduce."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        loss = torch.stack(losses).detach().mean() if losses else torch.zeros(())
        sums = torch.stack([norm.square(), loss])
        dist.all_reduce(sums)
        return sums[1].item(), sums[0].sqrt()


def _plan(job: JobConfig, schedule: str, ranks: int) -> Plan:
    placement, order = CUTS[schedule]
    pipeline = job.pipeline.model_copy(update={"placement": placement, "schedule": order})
    cut = job.model_copy(update={"pipeline": pipeline})
    return make_plan(cut, describe(job), num_workers=ranks, plan_id=1).plan


def main() -> None:
    """Train a job and write a line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--job", type=Path, required=True, help="job file")
    parser.add_argument("--schedule", choices=CUTS, required=True, help="torch's schedule")
    parser.add_argument("--steps", type=int, required=True, help="steps to train")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one a step")
    parser.add_argument("--checkpoints", type=Path, help="folder; none: no checkpoints")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    arguments = parser.parse_args()
    # Ends of the parts of a start, for `startup.py`.
    moments = {"torchrun: process, import": _process_start(), "ranks: import": time.time()}
    job = load_job(arguments.job, [])
    torch.set_num_threads(job.worker.threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # as deepopt's workers on one host
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    join_group(restart)
    moments["ranks: process group"] = time.time()
    try:
        loop = PipelinedLoop(job, arguments.schedule)
        moments["ranks: build"] = time.time()
        folder: Path | None = arguments.checkpoints
        done = 0 if folder is None else loop.load(folder)
        out = arguments.out.open("a", buffering=1) if dist.get_rank() == 0 else None
        ended = time.perf_counter()
        for step in range(done + 1, arguments.steps + 1):
            loss, norm = loop.step(step)
            if folder is not None and step % arguments.every == 0:
                loop.save(step, folder)
            began, ended = ended, time.perf_counter()
            if not math.isfinite(loss):
                raise SystemExit(f"step {step}: the loss is {loss}")
            if out is None:
                continue
            record: dict[str, object] = {
                "step": step,
                "loss": loss,
                "grad_norm": norm,
                "step_time_s": ended - began,
                "restart": restart,
            }
            if step == 1:
                record["moments"] = {**moments, "first step": time.time()}
            out.write(json.dumps(record) + "\n")
    finally:
        dist.destroy_process_group()


def join_group(restart: int) -> None:
    """Form the group; after a restart apart from the one before.

    torchrun's store lives on, and with torch 2.13 the group would find the addresses of the dead in it.

    Args:
        restart: how often torchrun has started the ranks again.
    """
    if restart == 0:
        dist.init_process_group("gloo")
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"restart-{restart}", dist.TCPStore(address, port)),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _process_start() -> float:
    """When this process was started, in seconds since the epoch."""
    # Field 22, counted after the name, which may hold spaces: clock ticks since the boot.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (uptime_s - ticks / os.sysconf("SC_CLK_TCK"))


if __name__ == "__main__":
    main()
