"""Simulated: how evenly each way of routing loads 256 experts, step by step.

4,096 tokens a step (8 sequences of 512), top-8 of 256 experts on 32 devices. Scores are drawn, not learned: a
popularity that falls as Zipf 1.1 and drifts, a part that tokens of a sequence share (correlated runs), and
noise; in the middle of the run a quarter of the experts swap popularities. Loads are scaled to a mean of 128
tokens an expert by that choice. The routers are the real ones; nothing is trained. `monitor_freq` is 10 for
all ways of ours, so that their warm-up, which works expert by expert, is over before averages begin.

All ways of a table make scores in the same way, `--score`: what share of gate mass even loads cost depends
far more on that than on the way (softmax scores differ by factors, sigmoid scores hardly).

    python benchmarks/elb_simulation.py            # the table and the scales, 3 seeds: a quarter of an hour
    python benchmarks/elb_simulation.py --score sigmoid
    python benchmarks/elb_simulation.py --methods elb "elb, devices"
    python benchmarks/elb_simulation.py --scales   # those alone
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
from deepopt.moe.router import SCORES
from deepopt.moe.step_totals import gate_masses

EXPERTS, TOP_K, DEVICES = 256, 8, 32
SEQUENCES, LENGTH = 8, 512
ZIPF = 1.1
DRIFT = 0.02  # of the popularities' spread, a step
SHARED = 0.3  # spread of what tokens of a sequence share, of the spread of the noise
# Of popularities, of the spread of the noise: gives plain top-k a load std of 100 with independent tokens.
SPREAD = 0.235
SETTLED = 1.25  # load std of at most so many times its steady value
STD_AIM = 3.2
STRAGGLER_AIM = 1.03
MASS_AIM = 0.3  # points
COLD_AIM, WARM_AIM, SHIFT_AIM = 10, 2, 10  # steps to settle
SCALES = (0.2, 0.5, 1.0, 2.0, 3.0)  # of the scores
SCALE_AIM = 0.01  # change of the load std over them, of its value at 1
STEADY = 15  # first steps, and first after the shift, that are left out of averages

_OURS: dict[str, Any] = {"monitor_freq": 10}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "sign, 0.001": {"mode": "sign"},
    "formula, every 100": {"mode": "formula"},
    "formula, every step": {"mode": "formula", "monitor_freq": 1, "alpha": 0.1},
    "quantile": {"mode": "quantile"},
    "elb, cold": {"warmup": False, "chunks": 1, **_OURS},
    "elb": {"chunks": 1, **_OURS},
    "elb, devices": {"devices": DEVICES, **_OURS},
    "elb, devices, alpha 1": {"devices": DEVICES, "alpha": 1.0, **_OURS},
    "elb, experts": {"level": "expert", "devices": DEVICES, **_OURS},
    "elb, experts, alpha 1": {"level": "expert", "devices": DEVICES, "alpha": 1.0, **_OURS},
}
QUICK = ("none", "elb, cold", "elb", "elb, devices", "elb, experts")


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
    name: str, *, score: str, seeds: int, steps: int, scale: float = 1.0, shared: float = 0.0
) -> Outcome:
    """A method over all seeds; `score` of its router, other arguments as of `run`."""
    method = {"score": score, **METHODS[name]}
    found = []
    for seed in range(seeds):
        progress(f"{name}: seed {seed}, scale {scale:g}, shared {shared:g}")
        found.append(run(method, steps=steps, seed=seed, scale=scale, shared=shared))
    return mean_of(found)


def sweep(name: str, *, score: str, seeds: int, steps: int) -> float:
    """Print the load std over scales of the scores; return its largest change from scale 1."""
    stds = {
        scale: measure(name, score=score, seeds=seeds, steps=steps, scale=scale).std
        for scale in SCALES
    }
    change = max(abs(std / stds[1.0] - 1) for std in stds.values())
    figures = ", ".join(f"{scale:g}: {std:.3f}" for scale, std in stds.items())
    say(f"{name}, std a step over scales of the scores: {figures}; change {100 * change:.2f} %")
    return change


def judge(found: dict[str, Outcome], change: float | None) -> None:
    """Print each aim with what was measured, and the worst ratio.

    Args:
        found: of correlated tokens, by method.
        change: over scales of the scores.
    """
    aims: list[tuple[str, float, float]] = []
    if "elb, experts" in found:
        aims.append(("load std a step at expert level", found["elb, experts"].std, STD_AIM))
    if {"elb", "elb, devices"} <= set(found):
        device, plain = found["elb, devices"], found["elb"]
        aims.append(("device max/mean", device.straggler, STRAGGLER_AIM))
        aims.append(("for points of gate mass", device.lost - plain.lost, MASS_AIM))
    if "elb, cold" in found:
        aims.append(("steps to settle, cold", found["elb, cold"].settled, COLD_AIM))
    if "elb" in found:
        aims.append(("steps to settle, warm", found["elb"].settled, WARM_AIM))
        aims.append(("steps after the shift", found["elb"].after_shift, SHIFT_AIM))
    if change is not None:
        aims.append(("change over scales of the scores", change, SCALE_AIM))
    say()
    say("tokens of a sequence alike:")
    for name, value, aim in aims:
        word = "reached" if value <= aim else "missed"
        say(f"  {name}: {value:.4g} (aim at most {aim:g}): {word}")
    if aims:
        say(ratio_line(min(aim / max(value, 1e-9) for _, value, aim in aims), aim=1.0))


def main() -> None:
    """Run the methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps and methods")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="only these")
    parser.add_argument("--scales", action="store_true", help="only the scales of the scores")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--score", choices=SCORES, default="softmax", help="of all ways")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds, steps = (1, 50) if options.quick else (options.seeds, 120)
    names = list(options.methods or (QUICK if options.quick else METHODS))
    if options.scales:
        names = []
    for line in describe():
        say(line)
    say(f"simulated {options.score} scores, real routers; loads are tokens an expert, mean 128")
    runs = {"score": options.score, "seeds": seeds, "steps": steps}
    rows, found = [], {}
    for name in names:
        iid = measure(name, **runs)
        alike = measure(name, **runs, shared=SHARED)
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
                f"{alike.settled}/{alike.after_shift}",
            ]
        )
    if rows:
        header = ["method", "std", "window", "MaxVio", "lost %", "settle", "step 1"]
        alike_header = ["alike: std", "MaxVio", "device max/mean", "lost %", "settle"]
        say(table([*header, *alike_header], rows))
        say(
            "settle: steps from the start / after the shift; alike: tokens of a sequence share a part"
        )
    change = None
    if options.scales or not (options.quick or options.methods):
        say()
        changes = [sweep(n, **runs) for n in options.methods or ("elb", "elb, experts")]
        change = max(changes)
    judge(found, change)


if __name__ == "__main__":
    main()
