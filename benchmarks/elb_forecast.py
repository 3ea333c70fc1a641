"""How right the forecast of each expert's load over the next 1,000 steps is, on the loads of real trainings.

The small MoE language model of `elb_training.py`, 32 experts, top-2, once with plain top-k, whose loads are
the model's own, and once with ELB, which evens them out. Every 500 steps the forecast (the head's,
`deepopt.head.load_forecast`) is compared with the loads of the next 1,000 steps; beside it what the loads of
the last 100 steps alone, and equal loads, would have said. Error: mean distance of an expert's share, over
the mean share.

    python benchmarks/elb_forecast.py            # 3,000 steps, two trainings: a quarter of an hour
    python benchmarks/elb_forecast.py --quick
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import elb_training
import torch
from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.head.load_forecast import LoadForecast, forecast_error
from deepopt.moe import ElbRouter
from deepopt.worker.load_window import LoadWindow

AIM = 0.013  # error over the next 1,000 steps; source: arXiv:2404.16914, GPT-3 350M
WAYS = {"none": {"mode": "none"}, "elb": {}}
EXPERTS = 32
RECENT = 100  # steps

Trace = list[list[list[int]]]  # by step, layer, expert


def trace_of(mode: str, *, steps: int, text: tuple[torch.Tensor, torch.Tensor]) -> Trace:
    """The loads of a training.

    Args:
        mode: one of `WAYS`.
        steps: of the optimizer.
        text: for training, and held out.
    """
    found: Trace = []

    def look(step: int, routers: Sequence[ElbRouter]) -> None:
        found.append([elb_training.load_of(router).tolist() for router in routers])
        if step % 100 == 0:
            progress(f"{mode}: step {step}")

    elb_training.train(WAYS[mode], experts=EXPERTS, steps=steps, seed=0, text=text, look=look)
    return found


def total(trace: Trace, layer: int, first: int, end: int) -> list[int]:
    """Loads of a layer over steps."""
    return [
        sum(column)
        for column in zip(*(trace[s][layer] for s in range(first, end)), strict=True)
    ]


def errors_of(
    trace: Trace, *, every: int, horizon: int
) -> list[tuple[int, float, float, float]]:
    """(step, error of the forecast, of the recent loads, of equal loads), means over the layers.

    Args:
        trace: loads.
        every: steps between two forecasts.
        horizon: steps that a forecast is for.
    """
    forecast, window = LoadForecast(), LoadWindow(RECENT)
    rows = []
    for done, layers in enumerate(trace, 1):
        told = window.add(done, tuple((str(i), tuple(loads)) for i, loads in enumerate(layers)))
        for layer, loads in () if told is None else told.loads:  # as the head gets them
            forecast.add(layer, loads, first_step=told.first_step, step=told.step)
        if done % every or done + horizon > len(trace):
            continue
        each = []
        for index in range(len(layers)):
            came = total(trace, index, done, done + horizon)
            recent = total(trace, index, max(0, done - RECENT), done)
            shares = [load / sum(recent) for load in recent]
            equal = [1 / EXPERTS] * EXPERTS
            each.append(
                [forecast_error(s, came) for s in (forecast.shares(str(index)), shares, equal)]
            )
        means = [statistics.mean(column) for column in zip(*each, strict=True)]
        rows.append((done, *means))
    return rows


def main() -> None:
    """Train, forecast, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="40 steps, forecasts over 10")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    steps, every, horizon = (40, 10, 10) if options.quick else (options.steps, 500, 1000)
    torch.set_num_threads(1)
    for line in describe():
        say(line)
    text = elb_training.read_text()
    last: dict[str, float] = {}
    for mode in WAYS:
        rows = errors_of(trace_of(mode, steps=steps, text=text), every=every, horizon=horizon)
        say()
        say(f"mode {mode}: error of what was said at a step of the next {horizon}")
        say(
            table(
                ["step", "forecast", f"last {RECENT} steps", "equal loads"],
                [
                    [str(step), *(f"{100 * error:.2f} %" for error in errors)]
                    for step, *errors in rows
                ],
            )
        )
        last[mode] = rows[-1][1]
    say()
    for mode, error in last.items():
        say(f"{mode}: the last forecast is off by {100 * error:.2f} % (aim {100 * AIM:.1f} %)")
    say("ratio: of the loads that ELB keeps, which are those that placement will see")
    say(ratio_line(AIM / last["elb"], aim=1.0))


if __name__ == "__main__":
    main()
