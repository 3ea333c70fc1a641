"""The peer's side of the emulated benchmarks: `torch.distributed.pipelining` on devices that are not there.

torch runs its own schedules over its own stages and gloo. A stage's module takes the time that
the cost table says: its forward ends when a device would have ended it, and so do its two parts
of backward, which are autograd functions of their own so that torch can split them. A step ends as
ours does: with one exchange of losses and norms, clipping, and an AdamW update.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepopt.pipeline.emulated_clock import sharpen_timer, wait_until
from deepopt.pipeline.transport import Transport
from deepopt.worker.rehearsal import RankSteps

WIDTH = 8
MAX_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSchedule:
    """One of torch's schedules.

    Args:
        name: its class in `torch.distributed.pipelining.schedules`.
        stages_per_rank: stages of a rank.
        folded: whether rank r holds stages r and 2p-1-r, else r, r + p, ...
        needs_microbatch_per_stage: whether torch refuses fewer micro-batches than stages.
    """

    name: str
    stages_per_rank: int = 1
    folded: bool = False
    needs_microbatch_per_stage: bool = False

    def takes(self, *, microbatches: int, ranks: int) -> bool:
        """Whether torch runs the schedule at these sizes."""
        return not self.needs_microbatch_per_stage or (
            microbatches >= ranks * self.stages_per_rank
        )


PEERS = {
    "1F1B": PeerSchedule(name="Schedule1F1B"),
    "Interleaved1F1B": PeerSchedule(name="ScheduleInterleaved1F1B", stages_per_rank=2),
    "InterleavedZeroBubble": PeerSchedule(
        name="ScheduleInterleavedZeroBubble", stages_per_rank=2
    ),
    "ZBVZeroBubble": PeerSchedule(name="ScheduleZBVZeroBubble", stages_per_rank=2, folded=True),
    "DualPipeV": PeerSchedule(
        name="ScheduleDualPipeV",
        stages_per_rank=2,
        folded=True,
        needs_microbatch_per_stage=True,
    ),
}


class PeerRank:
    """One rank of a peer.

    Args:
        rank: of the rank.
        transport: made the default process group that torch's stages use.
        peer: a key of `PEERS`.
        num_microbatches: of a step.
        forward_s: F of each stage.
        input_s: I of each stage.
        weight_s: W of each stage.
        update_s: optimizer update of each stage.
    """

    def __init__(
        self,
        rank: int,
        transport: Transport,
        *,
        peer: str,
        num_microbatches: int,
        forward_s: Sequence[float],
        input_s: Sequence[float],
        weight_s: Sequence[float],
        update_s: Sequence[float],
    ) -> None:
        from torch.distributed.pipelining import PipelineStage, schedules

        sharpen_timer()
        warnings.simplefilter("ignore")  # of torch's own schedules
        size, wanted = transport.world_size, PEERS[peer]
        num_stages = size * wanted.stages_per_rank
        held = [rank + size * i for i in range(wanted.stages_per_rank)]
        if wanted.folded:
            held = [rank, num_stages - 1 - rank]
        modules = [
            _EmulatedModule(forward_s[i], input_s=input_s[i], weight_s=weight_s[i])
            for i in held
        ]
        example = torch.zeros(1, WIDTH)
        stages = [
            PipelineStage(
                module,
                index,
                num_stages,
                torch.device("cpu"),
                input_args=example.clone().requires_grad_(index > 0),
                output_args=example.clone().requires_grad_(),
            )
            for module, index in zip(modules, held, strict=True)
        ]
        make: Any = getattr(schedules, wanted.name)
        self._schedule = make(
            stages[0] if wanted.stages_per_rank == 1 else stages,
            n_microbatches=num_microbatches,
            loss_fn=torch.nn.functional.mse_loss,
        )
        generator = torch.Generator().manual_seed(0)
        inputs, target = torch.randn(2, num_microbatches, WIDTH, generator=generator)
        self._inputs = (inputs,) if 0 in held else ()
        self._target = {"target": target} if num_stages - 1 in held else {}
        self._parameters = [p for module in modules for p in module.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, foreach=False)
        self._update_ns = round(1e9 * sum(update_s[i] for i in held))

    def run(self, num_steps: int) -> RankSteps:
        """Train some steps more."""
        ended_s, losses = [], []
        began_s = time.monotonic()
        for _ in range(num_steps):
            losses.append(self._step())
            ended_s.append(time.monotonic())
        return RankSteps(
            began_s=began_s,
            ended_s=tuple(ended_s),
            spans=(),
            losses=tuple(losses),
            num_ran_ahead=0,
            num_rolled_back=0,
            overruns=None,
        )

    def _step(self) -> float:
        micro_losses: list[torch.Tensor] = []
        self._schedule.step(*self._inputs, losses=micro_losses, **self._target)
        norms = [torch.linalg.vector_norm(p.grad) for p in self._parameters]
        loss = torch.stack(micro_losses).mean() if micro_losses else torch.zeros(())
        own = torch.stack(
            [loss.detach(), torch.linalg.vector_norm(torch.stack(norms))]
        ).double()
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        norm = torch.linalg.vector_norm(torch.stack([row[1] for row in rows]))
        began_ns = time.monotonic_ns()
        if norm > MAX_NORM:
            for parameter in self._parameters:
                parameter.grad.mul_(MAX_NORM / norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        wait_until(began_ns + self._update_ns)
        return float(sum(row[0] for row in rows))


class _EmulatedModule(torch.nn.Module):
    """y = (x + bias) * weight, in the time of a stage."""

    def __init__(self, forward_s: float, *, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(WIDTH))
        self.weight = torch.nn.Parameter(torch.ones(WIDTH))
        self._forward_ns, self._input_ns, self._weight_ns = (
            round(1e9 * seconds) for seconds in (forward_s, input_s, weight_s)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        began_ns = time.monotonic_ns()
        # The addition gives the first stage an input gradient to compute, as several layers would.
        moved = _TimedBackward.apply(x + self.bias, self._input_ns)
        out = moved * _TimedBackward.apply(self.weight, self._weight_ns)
        wait_until(began_ns + self._forward_ns)
        return out


class _TimedBackward(torch.autograd.Function):
    """Identity whose backward takes its time."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backward_ns: int) -> torch.Tensor:
        ctx.backward_ns = backward_ns
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        wait_until(time.monotonic_ns() + ctx.backward_ns)
        return grad, None
