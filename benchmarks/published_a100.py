"""Does the simulator give the throughputs that others measured on A100s.

First its bubble rates against those that arXiv:2401.10241 computed from profiled times (table 5): nothing is
fitted. Then the whole chain behind docs/scale.md: analytic costs of the model (`transformer_costs`),
simulated orders, samples a GPU and second against the measured ones (tables 4 and 6). One number
is fitted a model: its efficiency, from the 1F1B cell with the fewest micro-batches in table 4. All
other cells are predictions. Everything here is simulated; nothing runs on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from _published_a100 import FIT, TABLE_4, TABLE_5, TABLE_5_SCHEDULES, TABLE_6, Setup
from _published_orders import OVERLAPS_STEPS, placement_of, run_published
from _report import progress, ratio_line, say, table

from deepopt.planner.hardware import ACCELERATORS, Cluster
from deepopt.planner.transformer_costs import MODELS, transformer_costs
from deepopt.schedule.simulate import CostTable

AIM = 0.10  # largest relative error of a throughput
_ROUNDS = 20  # of the fixed point that solves an efficiency; it contracts at once


class Cell(NamedTuple):
    """A published throughput and ours."""

    table: int
    setup: Setup
    schedule: str
    num_microbatches: int
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Relative, positive where the prediction is too fast."""
        return self.predicted / self.published - 1


def main() -> None:
    """Print both comparisons and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewest micro-batches only")
    quick: bool = parser.parse_args().quick
    say("Bubble rates from profiled times, simulated here / published (table 5)\n")
    say(bubble_table(quick=quick) + "\n")
    efficiencies = {setup.model: fit(setup) for setup in TABLE_4}
    say("Fitted, one a model: " + ", ".join(f"{m} {e:.3f}" for m, e in efficiencies.items()))
    say("\nSamples a GPU and second: published, predicted (simulated), error\n")
    cells = list(predict(efficiencies, quick=quick))
    say(cell_table(cells) + "\n")
    predictions = [cell for cell in cells if not cell.fitted]
    for number in (4, 6):
        errors = [abs(cell.error) for cell in predictions if cell.table == number]
        within = sum(error <= AIM for error in errors)
        say(
            f"table {number}: {within} of {len(errors)} predictions within {AIM:.0%}, "
            f"mean {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}"
        )
    worst = max(predictions, key=lambda cell: abs(cell.error))
    say(
        f"worst error: {worst.error:+.1%} ({worst.setup.model}, b={worst.setup.microbatch_size}, "
        f"m={worst.num_microbatches}, {worst.schedule}); {AIM:.0%} over it:"
    )
    say(ratio_line(AIM / abs(worst.error), aim=1.0))


def bubble_table(*, quick: bool) -> str:
    """Rates of every profile of table 5 beside the published ones."""
    rows = []
    for profile in TABLE_5[::3] if quick else TABLE_5:
        forward, inputs, weight, comm = (time * 1e-3 for time in profile.times_ms)
        count = profile.num_microbatches
        row = [f"{profile.model}, p={profile.num_ranks}, m={count}"]
        for name, published in zip(TABLE_5_SCHEDULES, profile.bubbles, strict=True):
            placement = placement_of(
                name,
                num_ranks=profile.num_ranks,
                chunks=chain_length(profile.model) // profile.num_ranks,
            )
            share = profile.num_ranks / placement.num_stages
            costs = CostTable.uniform(
                placement.num_stages,
                forward_s=forward * share,
                input_s=inputs * share,
                weight_s=weight * share,
                latency_s=comm,
            )
            timeline = run_published(
                name,
                placement=placement,
                num_microbatches=count,
                costs=costs,
                weight_memory=weight_memory(profile.model),
            )
            rate = 1 - count * (forward + inputs + weight) / timeline.steady_s
            row.append(f"{rate:.4f} / {published:.4f}")
        rows.append(row)
    return table(("", *TABLE_5_SCHEDULES), rows)


def chain_length(model: str) -> int:
    """Layers that are shared out evenly: embedding and output layer stand for a block each.

    Source: arXiv:2401.10241, section 5.1 ("one fewer transformer layer").

    Args:
        model: key of `MODELS`.
    """
    return MODELS[model].num_layers + 2


def weight_memory(model: str) -> float:
    """What a micro-batch holds between I and W, against before I.

    Source: arXiv:2401.10241, table 1: 32sbh and sbh(34 + 5as/h).

    Args:
        model: key of `MODELS`.
    """
    shape = MODELS[model]
    return 32 / (34 + 5 * shape.heads * shape.sequence / shape.hidden)


def throughput(setup: Setup, name: str, *, num_microbatches: int, efficiency: float) -> float:
    """Samples a GPU and second, simulated.

    Args:
        setup: model and sizes.
        name: schedule as published.
        num_microbatches: of a step.
        efficiency: reached part of the A100's rates.
    """
    costs = transformer_costs(
        MODELS[setup.model],
        cluster=Cluster(accelerator=ACCELERATORS["A100"], num_gpus=setup.num_ranks),
        efficiency=efficiency,
        microbatch_size=setup.microbatch_size,
    )
    chain = chain_length(setup.model)
    placement = placement_of(name, num_ranks=setup.num_ranks, chunks=chain // setup.num_ranks)
    boundaries = tuple(range(0, chain, chain // placement.num_stages))
    timeline = run_published(
        name,
        placement=placement,
        num_microbatches=num_microbatches,
        costs=costs.table(boundaries, placement=placement),
        weight_memory=weight_memory(setup.model),
    )
    step_s = timeline.steady_s if name in OVERLAPS_STEPS else timeline.makespan_s
    return num_microbatches * setup.microbatch_size / setup.num_ranks / step_s


def fit(setup: Setup) -> float:
    """The efficiency at which one published cell comes out.

    Args:
        setup: a model of table 4.
    """
    count, published = setup.microbatches[0], TABLE_4[setup][FIT][0]
    efficiency = 0.5
    for _ in range(_ROUNDS):
        predicted = throughput(setup, FIT, num_microbatches=count, efficiency=efficiency)
        efficiency = min(1.0, efficiency * published / predicted)
    return efficiency


def predict(efficiencies: dict[str, float], *, quick: bool) -> Iterator[Cell]:
    """Every cell of both tables.

    Args:
        efficiencies: of each model.
        quick: only the fewest micro-batches.
    """
    for number, published in ((4, TABLE_4), (6, TABLE_6)):
        for setup, schedules in published.items():
            progress(f"table {number}: {setup.model}, b={setup.microbatch_size}")
            for name, values in schedules.items():
                columns = list(zip(setup.microbatches, values, strict=True))
                for index, (count, value) in enumerate(columns[:1] if quick else columns):
                    efficiency = efficiencies[setup.model]
                    predicted = throughput(
                        setup, name, num_microbatches=count, efficiency=efficiency
                    )
                    fitted = number == 4 and name == FIT and index == 0
                    yield Cell(number, setup, name, count, value, predicted, fitted)


def cell_table(cells: list[Cell]) -> str:
    """Cells as Markdown, one a row.

    Args:
        cells: in the order to print.
    """
    rows = [
        (
            f"{cell.table}: {cell.setup.model}",
            str(cell.setup.num_ranks),
            str(cell.setup.microbatch_size),
            str(cell.num_microbatches),
            cell.schedule,
            f"{cell.published:.2f}",
            f"{cell.predicted:.2f}",
            "fitted" if cell.fitted else f"{cell.error:+.1%}",
        )
        for cell in cells
    ]
    header = (
        "table: model",
        "ranks",
        "batch",
        "m",
        "schedule",
        "published",
        "predicted",
        "error",
    )
    return table(header, rows)


if __name__ == "__main__":
    main()
