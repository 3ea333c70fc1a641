"""Schedules in words, tables and JSON. From data to text, no I/O but for the size of the terminal."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deepopt.planner.choose import YARDSTICK, Comparison
from deepopt.planner.outcome import SEARCHED, Candidate, Outcome
from deepopt_cli.output import table

if TYPE_CHECKING:
    from deepopt.schedule.faults import Fault
    from deepopt.schedule.ir import Schedule

PIPE_COLUMNS = 120  # where no terminal says how wide it is
_HEADER = (
    "placement",
    "schedule",
    "step ms",
    "vs 1F1B",
    "bubble",
    "to bound",
    "activations",
    "copies",
    "transfers",
)


def columns() -> int:
    """How wide a drawing may be."""
    return shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns


def wants_color(asked: bool | None, *, stream: Any = None) -> bool:
    """Whether to write colours: as asked, else on a terminal that does not refuse them.

    Args:
        asked: what the user said; None for nothing.
        stream: where the text goes; stdout by default.
    """
    if asked is not None:
        return asked
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool((stream or sys.stdout).isatty())


def outcome_lines(
    outcome: Outcome, *, yardstick: Outcome | None, has_unit: bool, origin: str
) -> list[str]:
    """An order and its figures, a line each.

    Args:
        outcome: the order.
        yardstick: 1F1B on the same layers; None where there is none to compare with.
        has_unit: the costs are seconds; otherwise only ratios are told.
        origin: where the order is from.
    """
    schedule, timeline = outcome.schedule, outcome.timeline
    placement = schedule.placement
    bound = _percent_or_dash(outcome.gap)
    step = f"bubble {percent(timeline.bubble)}, {bound} above the lower bound"
    if has_unit:
        step = (
            f"{milliseconds(timeline.makespan_s)}, bubble {percent(timeline.bubble)}, {bound} above "
            f"the lower bound of {milliseconds(outcome.lower_bound_s or 0.0)}"
        )
    lines = [
        f"order       {origin}",
        f"pipeline    {counted(placement.num_ranks, 'rank')}, placement {placement.kind}, "
        f"{counted(placement.num_stages, 'stage')}, "
        f"{counted(schedule.num_microbatches, 'micro-batch')}",
        f"step        {step}",
    ]
    if yardstick is not None and schedule.name != YARDSTICK and timeline.makespan_s > 0:
        ratio = yardstick.timeline.makespan_s / timeline.makespan_s
        took = f"{milliseconds(yardstick.timeline.makespan_s)}, " if has_unit else ""
        lines.append(f"1F1B        {took}{ratio:.2f} times as long")
    held = outcome.peak_activations
    each = "" if len(set(held)) == 1 else f" ({' '.join(f'{peak:g}' for peak in held)})"
    copies = outcome.weight_copies
    lines += [
        f"memory      activations of at most {max(held):.3g} micro-batches on a rank{each}, "
        f"{'one copy' if copies == 1 else f'{copies} copies'} of the weights",
        f"transfers   {counted(outcome.num_transfers, 'tensor')} between ranks",
    ]
    return lines


def outcome_json(outcome: Outcome, *, has_unit: bool) -> dict[str, Any]:
    """An order and its figures for machines.

    Args:
        outcome: the order.
        has_unit: without it, times are left out: the costs are relative.
    """
    schedule, timeline = outcome.schedule, outcome.timeline
    placement = schedule.placement
    fields: dict[str, Any] = {
        "schedule": schedule.name,
        "placement": placement.kind,
        "num_ranks": placement.num_ranks,
        "num_stages": placement.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "directions": list(schedule.directions),
        "bubble": timeline.bubble,
        "gap": outcome.gap,
        "peak_activations": list(outcome.peak_activations),
        "weight_copies": outcome.weight_copies,
        "transfers": outcome.num_transfers,
        "best_builder": outcome.best_builder,
        "actions": [[str(action) for action in row] for row in schedule.actions],
    }
    if has_unit:
        fields |= {
            "makespan_s": timeline.makespan_s,
            "lower_bound_s": outcome.lower_bound_s,
            "spans": [
                [[str(span.action), span.start_s, span.end_s] for span in row]
                for row in timeline.spans
            ],
        }
    return fields


def comparison_table(comparison: Comparison, *, has_unit: bool) -> str:
    """Orders in a table.

    Args:
        comparison: what was tried.
        has_unit: the costs are seconds; otherwise only ratios are told.
    """
    return table(_header(has_unit), _rows(comparison, has_unit))


def comparison_csv(comparison: Comparison, *, has_unit: bool) -> str:
    """The same table as CSV.

    Args:
        comparison: what was tried.
        has_unit: the costs are seconds; otherwise only ratios are told.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_header(has_unit))
    writer.writerows(_rows(comparison, has_unit))
    return text.getvalue()


def _header(has_unit: bool) -> list[str]:
    return [name for name in _HEADER if has_unit or name != "step ms"]


def _rows(comparison: Comparison, has_unit: bool) -> Iterator[list[str]]:
    for candidate, outcome in comparison.found:
        ratio = _ratio(comparison, outcome)
        yield [
            str(candidate.shape),
            _order_words(candidate, outcome),
            *([f"{1e3 * outcome.timeline.makespan_s:.1f}"] if has_unit else []),
            "-" if ratio is None else f"{ratio:.2f} x",
            percent(outcome.timeline.bubble),
            _percent_or_dash(outcome.gap),
            f"{max(outcome.peak_activations):.3g}",
            str(outcome.weight_copies),
            str(outcome.num_transfers),
        ]


def _order_words(candidate: Candidate, outcome: Outcome) -> str:
    """A search that found nothing faster names the builder whose order it kept."""
    made_by = outcome.schedule.name
    return candidate.schedule if made_by == candidate.schedule else f"{SEARCHED} ({made_by})"


def _ratio(comparison: Comparison, outcome: Outcome) -> float | None:
    if comparison.one_f_one_b_s is None or outcome.step_s <= 0:
        return None
    return comparison.one_f_one_b_s / outcome.step_s


def comparison_json(comparison: Comparison, *, has_unit: bool) -> dict[str, Any]:
    """The comparison for machines.

    Args:
        comparison: what was tried.
        has_unit: the costs are seconds; otherwise only ratios are told.
    """
    bulky = ("actions", "spans", "directions")
    rows = []
    for candidate, outcome in comparison.found:
        fields = outcome_json(outcome, has_unit=has_unit)
        row = {key: value for key, value in fields.items() if key not in bulky}
        rows.append(
            {
                **row,
                "schedule": candidate.schedule,
                "order_of": outcome.schedule.name,
                "stages_per_rank": outcome.shape.stages_per_rank,
                "speed_up_over_1f1b": _ratio(comparison, outcome),
            }
        )
    return {
        "orders": rows,
        "misfits": [
            {
                "placement": candidate.shape.kind,
                "stages_per_rank": candidate.shape.stages_per_rank,
                "schedule": candidate.schedule,
                "reason": reason,
            }
            for candidate, reason in comparison.left_out
        ],
    }


def order_words(schedule: Schedule) -> str:
    """Sizes and needs of an order that is right, in a line.

    Args:
        schedule: verified.
    """
    from deepopt.schedule.verify import verify

    report = verify(schedule)
    placement = schedule.placement
    share = placement.num_ranks / placement.num_stages
    ops = {str(action.op) for row in schedule.actions for action in row}
    letters = " ".join(letter for letter in "FRIWB" if letter in ops)
    return (
        f"{letters} on {counted(placement.num_ranks, 'rank')}, placement {placement.kind}, "
        f"{counted(placement.num_stages, 'stage')}, "
        f"{counted(schedule.num_microbatches, 'micro-batch')}; at most "
        f"{max(report.peak_activations) * share:.3g} in flight on a rank, "
        f"{counted(report.num_transfers, 'transfer')}"
    )


def fault_drawing(schedule: Schedule, *, fault: Fault, color: bool) -> str:
    """The rows of a wrong order around its fault.

    Args:
        schedule: what is wrong.
        fault: where.
        color: with ANSI escapes.
    """
    from deepopt.schedule.draw import draw_order

    return draw_order(schedule, width=columns(), color=color, fault=fault)


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 rank`, `2 micro-batches`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("ch") else f"{number} {noun}s"


def milliseconds(seconds: float) -> str:
    """A time with a digit after the point, as schedules are compared."""
    return f"{1e3 * seconds:.1f} ms"


def _percent_or_dash(share: float | None) -> str:
    return "-" if share is None else percent(share)


def percent(share: float) -> str:
    """A share with a digit after the point; rounding of zero has no sign."""
    return f"{abs(round(100 * share, 1)):.1f} %"
