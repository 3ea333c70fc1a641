"""Where the figures of a step go: JSON lines always, TensorBoard on wish, more by entry point.

A package adds a sink with an entry point of the group `deepopt.metrics_sinks`: a callable that
takes a `RunDirectory` and returns a `MetricsSink`. A sink that raises is switched off with a
warning; no sink ever stops training.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from deepopt.run_directory import RunDirectory
from deepopt.telemetry.events import Warned
from deepopt.telemetry.files import JsonLinesWriter

logger = logging.getLogger(__name__)

ENTRY_POINTS = "deepopt.metrics_sinks"


_MOST_REFUSED = 100_000  # lines kept for a disk with room: a day of steps of a second


class MetricsSink(Protocol):
    """Takes the figures of each step."""

    def write(self, step: int, scalars: Mapping[str, object]) -> None:
        """Take the figures of one step.

        Args:
            step: 1-based; a replayed step comes again.
            scalars: numbers, lists of numbers (one a rank) or text, by name.
        """
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class JsonLinesSink:
    """One JSON line a step; what a full disk refuses is written as soon as there is room.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._writer = JsonLinesWriter(path)
        self._refused: deque[Mapping[str, object]] = deque(maxlen=_MOST_REFUSED)

    def write(self, step: int, scalars: Mapping[str, object]) -> None:
        """Append the step's line; the step comes first in it.

        Raises:
            OSError: the disk refused; the line is kept for the next call.
        """
        self._refused.append({"step": step, **scalars})
        while self._refused:
            self._writer.write(self._refused[0])
            self._refused.popleft()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class TensorBoardSink:
    """One TensorBoard event file for each time that the job is started.

    Written with the record format of the tensorboard package alone: no torch, no tensorflow, no
    thread. Flushed with each step, because a live view of the loss is what people open it for.

    Args:
        directory: folder of event files.
    """

    def __init__(self, directory: Path) -> None:
        # Half a second with protobuf and numpy: only where TensorBoard files are wanted.
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._make_event = Event
        self._make_summary = Summary
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard orders the files of a folder by this name.
        name = f"events.out.tfevents.{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, step: int, scalars: Mapping[str, object]) -> None:
        """Write the finite numbers of a step; entry i of a list as `name/rank_i`."""
        values = [
            self._make_summary.Value(tag=tag, simple_value=value)
            for tag, value in _numbers(scalars)
        ]
        summary = self._make_summary(value=values)
        self._write(self._make_event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, event: object) -> None:
        self._records.write(event.SerializeToString())  # type: ignore[attr-defined]
        self._records.flush()


class MetricsSinks:
    """Several sinks as one, none of which can do harm.

    Args:
        openers: by name, what opens each sink.
        on_warning: told when a sink is switched off.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], MetricsSink]],
        *,
        on_warning: Callable[[Warned], None],
    ) -> None:
        self._on_warning = on_warning
        self._complained: set[str] = set()  # sinks that could not write the last time
        self._sinks: dict[str, MetricsSink] = {}
        for name, opener in openers.items():
            try:
                self._sinks[name] = opener()
            except Exception as error:  # noqa: BLE001 - a sink is somebody else's code
                self._warn(name, error)

    @property
    def names(self) -> tuple[str, ...]:
        """The sinks that still work."""
        return tuple(self._sinks)

    def write(self, step: int, scalars: Mapping[str, object]) -> None:
        """Give the figures of a step to every sink that still works."""
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, scalars)
            except OSError as error:  # a full disk has room again some day
                if name not in self._complained:
                    self._complained.add(name)
                    message = f"metrics sink {name} cannot write: {error}"
                    self._on_warning(Warned(message=message))
            except Exception as error:  # noqa: BLE001 - a sink is somebody else's code
                del self._sinks[name]
                self._warn(name, error)
                self._close(name, sink)
            else:
                self._complained.discard(name)

    def close(self) -> None:
        """Close every sink; more than once is fine."""
        for name, sink in self._sinks.items():
            self._close(name, sink)
        self._sinks = {}

    def _close(self, name: str, sink: MetricsSink) -> None:
        try:
            sink.close()
        except Exception as error:  # noqa: BLE001 - a sink is somebody else's code
            logger.warning("metrics sink %s failed to close: %s", name, error)

    def _warn(self, name: str, error: Exception) -> None:
        message = f"metrics sink {name} is switched off: {type(error).__name__}: {error}"
        self._on_warning(Warned(message=message))


def open_metrics_sinks(
    run: RunDirectory,
    *,
    tensorboard: bool,
    on_warning: Callable[[Warned], None] | None = None,
) -> MetricsSinks:
    """Open every sink of a run.

    Args:
        run: the run directory.
        tensorboard: whether TensorBoard files are wanted.
        on_warning: takes the event of a sink that is switched off; None: the log.
    """
    openers: dict[str, Callable[[], MetricsSink]] = {
        "jsonl": lambda: JsonLinesSink(run.metrics)
    }
    if tensorboard:
        openers["tensorboard"] = lambda: TensorBoardSink(run.tensorboard)
    for entry in entry_points(group=ENTRY_POINTS):
        openers[entry.name] = lambda entry=entry: entry.load()(run)  # type: ignore[misc]
    return MetricsSinks(openers, on_warning=on_warning or _log)


def _log(event: Warned) -> None:
    logger.warning("%s", event.message)


def _numbers(scalars: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in scalars.items():
        tagged = (
            [(f"{name}/rank_{rank}", entry) for rank, entry in enumerate(value)]
            if isinstance(value, list | tuple)
            else [(name, value)]
        )
        for tag, entry in tagged:
            if isinstance(entry, bool) or not isinstance(entry, int | float):
                continue
            if math.isfinite(entry):
                yield tag, float(entry)
