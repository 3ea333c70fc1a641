"""Microseconds that an executor spends a compute action, ours and torch.distributed.pipelining's.

Four processes over gloo; a stage multiplies eight numbers, so that nearly all CPU time is the
executor's own: finding work, autograd's entry, sending, receiving, bookkeeping. Both sides run the
same order on the same cuts in turns, step by step, and are timed by the CPU clock of the training
thread, which does not see waiting. Our step is timed without its exchange of norms and its update,
torch's without an optimizer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from _machine import describe
from _processes import end_cleanly_on_signals
from _report import ratio_line, say, table
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleZBVZeroBubble

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.convert import describe as describe_model
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import Transport
from deepopt.planner.decide import make_plan
from deepopt.worker.rendezvous import transport_of_group

AIM = 1.0
RANKS, WIDTH = 4, 8
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order that both sides know.

    Args:
        placement: ours.
        schedule: ours.
        stages_per_rank: the same on both sides.
        ops: compute actions of one micro-batch on one stage.
    """

    placement: str
    schedule: str
    stages_per_rank: int
    ops: int


ORDERS = {
    "1F1B": Order(placement="line", schedule="1f1b", stages_per_rank=1, ops=2),
    "ZB-V": Order(placement="v", schedule="zb_v", stages_per_rank=2, ops=3),
}


class Scale(torch.nn.Module):
    """The smallest layer that has a weight, an input gradient and a weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1, WIDTH] to [1, WIDTH]."""
        return x * self.weight


class Chain(torch.nn.Sequential):
    """One layer a stage; its loss is the mean square."""

    @staticmethod
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A scalar."""
        return (output - targets).square().mean()


class Batches:
    """The same batch again and again: making one costs nothing."""

    def __init__(self) -> None:
        self._batch = (torch.ones(1, WIDTH), torch.zeros(1, WIDTH))

    def batch(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets."""
        return self._batch


def build(num_layers: int) -> Chain:
    """The model of our side."""
    return Chain(*(Scale() for _ in range(num_layers)))


def main() -> None:
    """Measure both orders and print the table and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=32, help="a step [32]")
    parser.add_argument("--steps", type=int, help="steps measured [60, quick: 10]")
    parser.add_argument("--quick", action="store_true", help="short: does it run?")
    options = parser.parse_args()
    steps = options.steps or (10 if options.quick else 60)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    say(
        f"job:      {RANKS} ranks x 1 thread, {options.microbatches} micro-batches of {WIDTH} "
        f"numbers, {steps} steps a side in turns, median"
    )
    rows, ratios = [], []
    for name, order in ORDERS.items():
        measured = _measure(order, microbatches=options.microbatches, steps=steps)
        for rank, (ours_us, torch_us) in enumerate(measured):
            ratio = torch_us / ours_us
            rows.append((name, str(rank), f"{ours_us:.0f}", f"{torch_us:.0f}", f"{ratio:.2f}"))
        ratios.append(sum(t for _, t in measured) / sum(o for o, _ in measured))
    say(
        "\n"
        + table(("order", "rank", "deepopt us", "torch us", "torch / deepopt"), rows)
        + "\n"
    )
    say("CPU microseconds an action; the ratio is of all ranks together, in the worse order")
    say(ratio_line(min(ratios), aim=AIM))


def _measure(order: Order, *, microbatches: int, steps: int) -> list[tuple[float, float]]:
    """Microseconds an action by rank: ours, torch's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    processes = [
        context.Process(
            target=_work, args=(rank, order, microbatches, steps, port, answers), daemon=True
        )
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    measured = dict(answers.get(timeout=TIMEOUT_S) for _ in processes)
    for process in processes:
        process.join(TIMEOUT_S)
    return [measured[rank] for rank in range(RANKS)]


def _work(
    rank: int, order: Order, microbatches: int, steps: int, port: int, answers: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = TCPStore(
        "127.0.0.1", port, is_master=rank == 0, timeout=timedelta(seconds=TIMEOUT_S)
    )
    device = torch.device("cpu")
    transport = transport_of_group(
        rank=rank,
        world_size=RANKS,
        device=device,
        timeout_s=TIMEOUT_S,
        form_timeout_s=TIMEOUT_S,
    )
    transport.join(store, generation=1)
    ours = _our_step(order, microbatches, rank, transport)
    theirs = _torch_step(order, microbatches, rank)
    actions = microbatches * order.stages_per_rank * order.ops
    took: tuple[list[float], list[float]] = ([], [])
    for step in range(1, steps + 4):
        sides = list(zip((ours, theirs), took, strict=True))
        for run, seconds in sides if step % 2 else reversed(sides):
            seconds.append(run(step))
    ours_us, torch_us = (1e6 * statistics.median(s[3:]) / actions for s in took)
    answers.put((rank, (ours_us, torch_us)))
    dist.barrier()
    transport.close()


def _our_step(
    order: Order, microbatches: int, rank: int, transport: Transport
) -> Callable[[int], float]:
    num_stages = RANKS * order.stages_per_rank
    job = JobConfig.model_validate(
        {
            "model": {
                "factory": f"{build.__module__}:build",
                "kwargs": {"num_layers": num_stages},
            },
            "training": {"microbatches": microbatches, "grad_clip": None},
            "pipeline": {"placement": order.placement, "schedule": order.schedule},
        }
    )
    skeleton = describe_model(job)
    plan = make_plan(job, skeleton, num_workers=RANKS, plan_id=1).plan
    device = torch.device("cpu")
    indices = [i for stage in plan.held_stages(rank) for i in plan.stage_layers(stage)]
    layers, loss = build_layers(job, indices, device=device)
    pipeline = PipelineStep(
        job=job,
        plan=plan,
        skeleton=skeleton,
        rank=rank,
        layers=dict(zip(indices, layers, strict=True)),
        loss=loss,
        transport=transport,
        batches=Batches(),
        device=device,
    )
    took = [0.0]
    execute = pipeline.executor.run_step

    def timed(step: int) -> None:
        began = time.thread_time()
        execute(step)
        took[0] = time.thread_time() - began

    pipeline.executor.run_step = timed  # type: ignore[method-assign]

    def run(step: int) -> float:
        pipeline.run(step)
        return took[0]

    return run


def _torch_step(order: Order, microbatches: int, rank: int) -> Callable[[int], float]:
    num_stages = RANKS * order.stages_per_rank
    held = [rank] if order.stages_per_rank == 1 else [rank, num_stages - 1 - rank]
    device = torch.device("cpu")
    stages = [PipelineStage(Scale(), index, num_stages, device) for index in held]
    schedule: Schedule1F1B | ScheduleZBVZeroBubble
    if order.stages_per_rank == 1:
        schedule = Schedule1F1B(stages[0], microbatches, loss_fn=Chain.loss)
    else:
        schedule = ScheduleZBVZeroBubble(list(stages), microbatches, loss_fn=Chain.loss)
    inputs = (torch.ones(microbatches, WIDTH),) if 0 in held else ()
    target = torch.zeros(microbatches, WIDTH) if num_stages - 1 in held else None

    def run(step: int) -> float:
        _forget_gradients(stages)
        began = time.thread_time()
        losses: list[torch.Tensor] = []
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        return time.thread_time() - began

    return run


def _forget_gradients(stages: Sequence[PipelineStage]) -> None:
    for stage in stages:
        for parameter in stage.submod.parameters():
            parameter.grad = None


if __name__ == "__main__":
    main()
