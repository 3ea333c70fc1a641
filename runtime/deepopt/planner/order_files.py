"""Orders in files: read them, and find out whether they are right."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from deepopt.errors import InputError
from deepopt.planner.sketch import stage_cap
from deepopt.schedule.csv_order import from_csv, transfers_from_csv
from deepopt.schedule.faults import Fault
from deepopt.schedule.ir import Schedule
from deepopt.schedule.lowering import Lowered
from deepopt.schedule.verify import find_fault
from deepopt.schedule.verify_lowered import find_transfer_fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a CSV file holds.

    Args:
        schedule: its compute actions.
        lowered: all of its actions; None where it has no sends and receives.
    """

    schedule: Schedule
    lowered: Lowered | None

    @property
    def drawn(self) -> Schedule:
        """The schedule with everything that the file holds, for drawing."""
        return replace(self.schedule, actions=self.lowered or self.schedule.actions)


def read_order(path: Path) -> Order:
    """The order in a file.

    Args:
        path: in torch's CSV format.

    Raises:
        DeepoptError: not there, not text, or not an order; with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not text: byte {error.start} is no UTF-8",
            remedy="give an order in torch's CSV format: one line per rank, 0F0,0F1,0B0,..",
        ) from None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}",
            remedy=f"check the path; deepopt schedule show --csv {path} writes an order",
        ) from None
    if path.suffix in (".yaml", ".yml"):
        raise InputError(
            f"{path} is a YAML file, not an order in torch's CSV format",
            remedy=f"deepopt schedule show {path} --csv order.csv writes the order of a job file",
        )
    return Order(
        schedule=from_csv(text, name=path.stem, source=str(path)),
        lowered=transfers_from_csv(text, source=str(path)),
    )


def find_order_fault(order: Order, *, memory_cap: float | None, buffers: int) -> Fault | None:
    """The first fault of an order from a file; None when it is right.

    Args:
        order: with sends and receives, these are checked as they stand too.
        memory_cap: in micro-batches of a rank's share.
        buffers: sends under way per channel.
    """
    placement = order.schedule.placement
    cap = None if memory_cap is None else stage_cap(memory_cap, placement=placement)
    fault = find_fault(order.schedule, memory_cap=cap)
    if fault is None and order.lowered is not None:
        transfer = find_transfer_fault(order.schedule, rows=order.lowered, buffers=buffers)
        if transfer is not None:
            return Fault(rank=transfer.rank, action=transfer.action, message=transfer.message)
    return fault
