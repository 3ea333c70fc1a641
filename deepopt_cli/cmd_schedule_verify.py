"""`deepopt schedule verify`: is an order right? If not: the action, the reason and a drawing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepopt_cli.output import EXIT_ERROR, reports_errors, say, say_json, show_error
from deepopt_cli.schedule_options import Color, MemoryCap

if TYPE_CHECKING:
    from deepopt.schedule.faults import Fault


@reports_errors
def verify(
    orders: Annotated[
        list[Path],
        typer.Argument(metavar="ORDER.csv...", help="Orders in torch's CSV format."),
    ],
    memory_cap: MemoryCap = None,
    buffers: Annotated[
        int,
        typer.Option(
            min=1, help="Sends under way per channel, for a file with sends and receives."
        ),
    ] = 1,
    color: Color = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say whether orders are right: exit code 0, or 1 with action, reason and drawing.

    Checked: every micro-batch does each op once and where it belongs; nothing runs before what it
    needs; gradients of a stage are added in order; no deadlock, also with one send under way per
    channel; channels deliver in order; the memory cap.

    \b
    Examples:
      deepopt schedule verify order.csv
      deepopt schedule verify *.csv --memory-cap 4
      deepopt schedule show --schedule 1f1b --csv order.csv && deepopt schedule verify order.csv
    """
    from deepopt.errors import DeepoptError
    from deepopt.planner.order_files import Order, find_order_fault, read_order
    from deepopt_cli.schedule_views import fault_drawing, order_words, wants_color

    failed = False
    results: list[dict[str, Any]] = []
    for path in orders:
        order: Order | None = None
        fault: Fault | None = None
        message = remedy = ""
        try:
            order = read_order(path)
            fault = find_order_fault(order, memory_cap=memory_cap, buffers=buffers)
        except DeepoptError as error:
            message, remedy = error.message, error.remedy
        if fault is not None:
            message, remedy = f"{path}: {fault.message}", fault.remedy
        failed |= bool(message)
        results.append(_result(path, fault=fault, message=message))
        if json:
            continue
        if not message:
            assert order is not None, "an order without a message was read"
            say(f"{path}: right: {order_words(order.schedule)}")
        elif fault is None or order is None:
            show_error(message, remedy=remedy)
        else:
            drawing = fault_drawing(
                order.drawn, fault=fault, color=wants_color(color, stream=sys.stderr)
            )
            show_error(message, remedy=remedy, details=drawing)
    if json:
        say_json({"orders": results})
    if failed:
        raise typer.Exit(EXIT_ERROR)


def _result(path: Path, *, fault: Fault | None, message: str) -> dict[str, Any]:
    return {
        "file": str(path),
        "right": not message,
        "message": message or None,
        "rank": None if fault is None else fault.rank,
        "action": None if fault is None else str(fault.action),
        "related": [] if fault is None else [str(action) for action in fault.related],
    }
