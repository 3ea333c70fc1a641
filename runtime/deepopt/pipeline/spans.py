"""When each action of a step ran on this worker, and how long it kept the device busy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from deepopt.schedule.ir import COMPUTE_OPS, RECEIVE_OPS, Action, Op


class Span(NamedTuple):
    """One action on one worker.

    Args:
        action: what ran.
        start_ns: wall clock of the process's performance counter.
        end_ns: the same clock.
        busy_ns: time on the device: CPU time of the training thread, or GPU time between two
            events.
    """

    action: Action
    start_ns: int
    end_ns: int
    busy_ns: int


@dataclass(slots=True)
class Totals:
    """Seconds by kind of action."""

    compute_s: float = 0.0
    wait_s: float = 0.0
    send_s: float = 0.0
    reduce_s: float = 0.0


class SpanRecorder:
    """Records the spans of one step after the other.

    Args:
        device: a CUDA device is timed with events on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # (action, start, end, busy): spans are made of them when the step is over.
        self._raw: list[tuple[Action, int, int, int]] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event] | None] = []
        self._begun: tuple[int, int, torch.cuda.Event | None] = (0, 0, None)

    def begin(self) -> None:
        """An action starts."""
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        self._begun = (time.perf_counter_ns(), time.thread_time_ns(), event)

    def end(self, action: Action) -> None:
        """The action that began last is done."""
        start, busy, begun = self._begun
        if begun is not None:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append((begun, event))
        busy = time.thread_time_ns() - busy
        self._raw.append((action, start, time.perf_counter_ns(), busy))

    def take(self) -> list[Span]:
        """The spans since the last call; waits for the GPU to reach the last of them."""
        spans = [Span(*raw) for raw in self._raw]
        self._raw.clear()
        if not self._cuda:
            return spans
        events, self._events = self._events, []
        torch.cuda.synchronize()
        timed = []
        for span, pair in zip(spans, events, strict=True):
            assert pair is not None, "a CUDA span without events"
            timed.append(span._replace(busy_ns=round(pair[0].elapsed_time(pair[1]) * 1e6)))
        return timed


def total(spans: list[Span], *, device_time: bool) -> Totals:
    """Add spans up by kind.

    Args:
        spans: of one step.
        device_time: take compute from the device's own clock instead of the wall.
    """
    totals = Totals()
    for span in spans:
        wall_s = (span.end_ns - span.start_ns) * 1e-9
        if span.action.op in COMPUTE_OPS:
            totals.compute_s += span.busy_ns * 1e-9 if device_time else wall_s
        elif span.action.op in RECEIVE_OPS:
            totals.wait_s += wall_s
        elif span.action.op is Op.REDUCE:
            totals.reduce_s += wall_s
        else:
            totals.send_s += wall_s
    return totals
