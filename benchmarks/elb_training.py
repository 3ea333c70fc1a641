"""Does balance cost quality: a small MoE language model trained with each way of routing.

The built-in model in small on the Python standard library's sources (bytes): 3 blocks, width 64, 2 of 32
experts (and of 64), 1,024 tokens a step, sigmoid scores, one process. All ways see the same data in the same
order and start from the same weights; the validation loss is of held-out files. Seeds change both.

    python benchmarks/elb_training.py                # 1,000 steps, 3 seeds, both sizes: about an hour
    python benchmarks/elb_training.py --experts 32 --seeds 1
    python benchmarks/elb_training.py --ways quantile elb "elb, devices"
    python benchmarks/elb_training.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.models.moe_transformer import MoeTransformer, build
from deepopt.moe import ElbRouter, balancer

LENGTH, BATCH = 128, 8
HELD_OUT = 64  # sequences of validation
DEVICES = 8
WAYS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "aux 0.01": {"mode": "aux"},
    "sign 0.001": {"mode": "sign"},
    "quantile": {"mode": "quantile"},
    "elb": {},
    "elb, devices": {"devices": DEVICES},
    "elb, experts": {"level": "expert"},
}
OTHERS = ("none", "aux 0.01", "sign 0.001", "quantile")
DEVICE_AIM = 0.003  # loss above elb without feedback inside the step, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one training.

    Args:
        loss: validation loss, nats a byte.
        max_vio: mean over layers and the last fifth of the steps.
        straggler: busiest of 8 devices over the mean, the same mean.
    """

    loss: float
    max_vio: float
    straggler: float


def read_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the standard library: for training, and of files held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        parts[index % 10 == 0].append(file.read_bytes())
    training, held_out = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts
    )
    return training, held_out


def batch_of(text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of sequences."""
    rows = torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


def train(
    way: dict[str, Any],
    *,
    experts: int,
    steps: int,
    seed: int,
    text: tuple[torch.Tensor, torch.Tensor],
    look: Callable[[int, Sequence[ElbRouter]], None] | None = None,
) -> Outcome:
    """One training from the start.

    Args:
        way: arguments of the routers.
        experts: of each block.
        steps: of the optimizer.
        seed: of weights and order.
        text: for training, and held out.
        look: is told of each step and its routers before they are updated.
    """
    torch.manual_seed(seed)
    model = build(
        d_model=64,
        num_blocks=3,
        num_heads=4,
        num_experts=experts,
        top_k=2,
        expert_hidden=32,
        num_dense_layers=0,
        num_shared_experts=1,
        router_kwargs={"score": "sigmoid", **way},
    )
    routers = [module for module in model.modules() if isinstance(module, ElbRouter)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    order = torch.Generator().manual_seed(seed)
    vio, straggler = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            done = step / steps
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1.0 - 0.9 * done)
        starts = torch.randint(len(text[0]) - LENGTH - 1, (BATCH,), generator=order)
        inputs, targets = batch_of(text[0], starts)
        loss = model.loss(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step >= steps * 4 // 5:
            loads = [load_of(router) for router in routers]
            vio += [balancer.max_violation(load) for load in loads]
            straggler += [balancer.straggler_factor(load, devices=DEVICES) for load in loads]
        if look is not None:
            look(step, routers)
        for router in routers:
            router.update()
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(
        loss=_validate(model, text[1]),
        max_vio=statistics.mean(vio),
        straggler=statistics.mean(straggler),
    )


def load_of(router: ElbRouter) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each expert in the step so far."""
    return router.read_counts(router._own_counts().numpy()).load


@torch.no_grad()
def _validate(model: MoeTransformer, text: torch.Tensor) -> float:
    model.eval()
    starts = torch.linspace(0, len(text) - LENGTH - 2, HELD_OUT).long()
    losses = []
    for part in starts.split(BATCH):
        inputs, targets = batch_of(text, part)
        losses.append(float(model.loss(model(inputs), targets)))
    return statistics.mean(losses)


def main() -> None:
    """Train all ways and print a table a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed, one size")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="*", default=[32, 64])
    parser.add_argument(
        "--ways", nargs="*", choices=WAYS, default=list(WAYS), help="only these"
    )
    options = parser.parse_args()
    steps, seeds, sizes = options.steps, options.seeds, options.experts
    if options.quick:
        steps, seeds, sizes = 20, 1, sizes[:1]
    torch.set_num_threads(1)
    for line in describe():
        say(line)
    text = read_text()
    worst = float("inf")
    for experts in sizes:
        found: dict[str, list[Outcome]] = {name: [] for name in options.ways}
        for seed in range(seeds):
            for name in options.ways:
                outcome = train(WAYS[name], experts=experts, steps=steps, seed=seed, text=text)
                found[name].append(outcome)
                progress(f"{experts} experts, seed {seed}, {name}: {outcome}")
        losses = {name: statistics.mean(o.loss for o in some) for name, some in found.items()}
        rows = [
            [
                name,
                f"{losses[name]:.4f}",
                *(f"{outcome.loss:.4f}" for outcome in some),
                f"{statistics.mean(o.max_vio for o in some):.3f}",
                f"{statistics.mean(o.straggler for o in some):.3f}",
            ]
            for name, some in found.items()
        ]
        say()
        say(f"{experts} experts, top-2, {steps} steps")
        seeds_header = [f"seed {seed}" for seed in range(seeds)]
        say(table(["way", "val loss", *seeds_header, "MaxVio", "device max/mean"], rows))
        others = [losses[name] for name in OTHERS if name in losses]
        if "elb" in losses and others:
            say(f"elb {losses['elb']:.4f}, best of the others {min(others):.4f}")
            worst = min(worst, min(others) / losses["elb"])
        if {"elb", "elb, devices"} <= set(losses):
            say(
                f"feedback at device level costs {losses['elb, devices'] - losses['elb']:+.4f} "
                f"(aim at most {DEVICE_AIM:+.3f})"
            )
    if worst < float("inf"):
        say("ratio: best validation loss of the others over elb's, the worst size")
        say(ratio_line(worst, aim=1.0))


if __name__ == "__main__":
    main()
