"""Simulated: how evenly each way of routing loads 256 experts, step by step.

4,096 tokens a step (8 sequences of 512), top-8 of 256 experts on 32 devices. Scores are drawn, not learned: a
popularity that falls as Zipf 1.1 and drifts, a part that tokens of a sequence share (correlated runs), and
noise; in the middle of the run a quarter of the experts swap popularities. Loads are scaled to a mean of 128
tokens an expert by that choice. The routers are the real ones; nothing is trained.

    python benchmarks/elb_simulation.py            # the table, 3 seeds
    python benchmarks/elb_simulation.py --quick
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.moe import ElbRouter, balancer
from deepopt.moe.step_totals import gate_masses

EXPERTS, TOP_K, DEVICES = 256, 8, 32
SEQUENCES, LENGTH = 8, 512
ZIPF = 1.1
DRIFT = 0.02  # of the popularities' spread, a step
SHARED = 0.35  # spread of what tokens of a sequence share, of the spread of the noise
SPREAD = (
    0.42  # of popularities, of the spread of the noise: gives the load std 100 of plain top-k
)
SETTLED = 1.25  # load std of at most so many times its steady value
STD_AIM = 3.2
STRAGGLER_AIM = 1.03
MASS_AIM = 0.3  # points
STEADY = 15  # first steps, and first after the shift, that are left out of averages

METHODS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "sign, 0.001": {"mode": "sign", "score": "sigmoid"},
    "formula, every 100": {"mode": "formula"},
    "formula, every step": {"mode": "formula", "monitor_freq": 1, "alpha": 0.1},
    "quantile": {"mode": "quantile", "score": "sigmoid"},
    "elb, cold": {"warmup": False, "chunks": 1},
    "elb": {"chunks": 1},
    "elb, devices": {"devices": DEVICES},
    "elb, devices, alpha 1": {"devices": DEVICES, "alpha": 1.0},
    "elb, experts": {"level": "expert", "devices": DEVICES},
    "elb, experts, alpha 1, 32 chunks": {
        "level": "expert",
        "devices": DEVICES,
        "alpha": 1.0,
        "chunks": 32,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one run.

    Args:
        std: load std a step, mean over steady steps, tokens.
        window: load std of the mean load of all steady steps before the shift.
        max_vio: mean over steady steps.
        straggler: busiest device over the mean one, mean over steady steps.
        lost: gate mass lost against top-k without bias, percent.
        settled: steps until the load std was near its steady value, from the start.
        after_shift: the same after the shift.
        first_std: load std of the first step.
    """

    std: float
    window: float
    max_vio: float
    straggler: float
    lost: float
    settled: int
    after_shift: int
    first_std: float


def logits_of(steps: int, *, seed: int, scale: float, shared: float) -> Iterator[torch.Tensor]:
    """[T, E] of each step."""
    generator = torch.Generator().manual_seed(seed)
    popular = -ZIPF * torch.arange(1, EXPERTS + 1).double().log()
    popular = (popular - popular.mean()) / popular.std()
    popular = popular[torch.randperm(EXPERTS, generator=generator)].float()
    for step in range(steps):
        walk = DRIFT * torch.randn(EXPERTS, generator=generator)
        popular = (popular + walk) / (1 + DRIFT**2) ** 0.5
        if step == steps // 2:
            chosen = torch.randperm(EXPERTS, generator=generator)[: EXPERTS // 4]
            popular[chosen] = popular[chosen.roll(1)]
        noise = torch.randn(SEQUENCES, LENGTH, EXPERTS, generator=generator)
        topic = torch.randn(SEQUENCES, 1, EXPERTS, generator=generator)
        own = (1 - shared**2) ** 0.5
        yield scale * (SPREAD * popular + shared * topic + own * noise).view(-1, EXPERTS)


def run(
    method: dict[str, Any], *, steps: int, seed: int, scale: float, shared: float
) -> Outcome:
    """One run of one method.

    Args:
        method: arguments of the router.
        steps: with the shift in the middle.
        seed: of the scores.
        scale: of the scores.
        shared: spread of what tokens of a sequence share.
    """
    router = ElbRouter(1, num_experts=EXPERTS, top_k=TOP_K, **method)
    loads, lost = [], []
    for logits in logits_of(steps, seed=seed, scale=scale, shared=shared):
        _, _, load = router.route(logits, sequence_length=LENGTH)
        best, chosen = gate_masses(router._own_counts().numpy())
        loads.append(load.double().numpy())
        lost.append(100 * (1 - chosen / best))
        router.update()
    stds = [float(load.std()) for load in loads]
    half = steps // 2
    steady = [*range(STEADY, half), *range(half + STEADY, steps)]
    level = statistics.median(stds[STEADY:half])
    return Outcome(
        std=statistics.mean(stds[i] for i in steady),
        window=float(np.mean(loads[STEADY:half], axis=0).std()),
        max_vio=statistics.mean(balancer.max_violation(loads[i]) for i in steady),
        straggler=statistics.mean(
            balancer.straggler_factor(loads[i], devices=DEVICES) for i in steady
        ),
        lost=statistics.mean(lost[i] for i in steady),
        settled=_settled(stds[:half], level),
        after_shift=_settled(stds[half:], level),
        first_std=stds[0],
    )


def _settled(stds: list[float], level: float) -> int:
    """Steps before the first three in a row that are near the level."""
    for step in range(len(stds) - 2):
        if max(stds[step : step + 3]) <= SETTLED * level:
            return step
    return len(stds)


def mean_of(outcomes: list[Outcome]) -> Outcome:
    """Of several seeds."""
    means = {
        name: statistics.mean(getattr(o, name) for o in outcomes) for name in Outcome.__slots__
    }
    return Outcome(**{**means, **{n: round(means[n]) for n in ("settled", "after_shift")}})


def measure(
    name: str, *, seeds: int, steps: int, scale: float = 1.0, shared: float = 0.0
) -> Outcome:
    """A method over all seeds; arguments as of `run`."""
    found = []
    for seed in range(seeds):
        progress(f"{name}: seed {seed}, scale {scale:g}, shared {shared:g}")
        found.append(run(METHODS[name], steps=steps, seed=seed, scale=scale, shared=shared))
    return mean_of(found)


def main() -> None:
    """Run the methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, few steps, four methods"
    )
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="only these")
    options = parser.parse_args()
    seeds, steps = (1, 50) if options.quick else (3, 120)
    names = options.methods or (
        ["none", "elb", "elb, devices", "elb, experts, alpha 1, 32 chunks"]
        if options.quick
        else list(METHODS)
    )
    for line in describe():
        say(line)
    say("simulated scores, real routers; figures of the load are tokens an expert, mean 128")
    rows, found = [], {}
    for name in names:
        iid = measure(name, seeds=seeds, steps=steps)
        alike = measure(name, seeds=seeds, steps=steps, shared=SHARED)
        found[name] = alike
        rows.append(
            [
                name,
                f"{iid.std:.2f}",
                f"{iid.window:.2f}",
                f"{iid.max_vio:.3f}",
                f"{iid.lost:.1f}",
                f"{iid.settled}/{iid.after_shift}",
                f"{iid.first_std:.1f}",
                f"{alike.std:.2f}",
                f"{alike.max_vio:.3f}",
                f"{alike.straggler:.3f}",
                f"{alike.lost:.2f}",
            ]
        )
    header = ["method", "std", "window", "MaxVio", "lost %", "settle", "step 1", "alike: std"]
    say(table([*header, "MaxVio", "device max/mean", "lost %"], rows))
    say(
        "settle: steps from the start / after the shift; alike: tokens of a sequence share a part"
    )
    if not options.quick and not options.methods:
        say()
        say("elb over scales of the scores (std a step, i.i.d.):")
        stds = [
            measure("elb", seeds=1, steps=steps, scale=scale).std for scale in (0.2, 1.0, 3.0)
        ]
        say(f"  0.2: {stds[0]:.3f}, 1: {stds[1]:.3f}, 3: {stds[2]:.3f}")
    best = "elb, experts, alpha 1, 32 chunks"
    if {"elb", "elb, devices", best} <= set(found):
        device, plain = found["elb, devices"], found["elb"]
        say()
        say(
            f"device max/mean {device.straggler:.3f} (aim {STRAGGLER_AIM}), for "
            f"{device.lost - plain.lost:+.2f} points of gate mass (aim {MASS_AIM})"
        )
        say(f"load std a step at expert level {found[best].std:.2f} (aim {STD_AIM})")
        say(ratio_line(STD_AIM / found[best].std, aim=1.0))


if __name__ == "__main__":
    main()
