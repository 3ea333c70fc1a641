"""Perfetto traces of a step: a process a rank; compute, wait, send and reduce on tracks apart.

Open the files at https://ui.perfetto.dev. This module takes spans that are recorded elsewhere
(`pipeline.spans`) and records nothing itself. Format: Chrome's "Trace Event Format".
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from deepopt.telemetry.files import write_json_atomic

TRACKS = ("compute", "wait", "send", "reduce")
_TRACK_OF_PREFIX = {"RECV": "wait", "SEND": "send", "REDU": "reduce"}


class TracedAction(Protocol):
    """What was done: printed as `2F5`, with its stage, operation and micro-batch."""

    @property
    def stage(self) -> int:
        """Global stage index."""
        ...

    @property
    def op(self) -> str:
        """The operation, for example `F` or `RECV_F`."""
        ...

    @property
    def microbatch(self) -> int | None:
        """Index of the micro-batch; None for REDUCE."""
        ...


class TracedSpan(Protocol):
    """When it was done, in nanoseconds of the process's performance counter."""

    @property
    def action(self) -> TracedAction:
        """What was done."""
        ...

    @property
    def start_ns(self) -> int:
        """Start."""
        ...

    @property
    def end_ns(self) -> int:
        """End."""
        ...


def write_trace(path: Path, *, rank: int, spans: Sequence[TracedSpan]) -> None:
    """Write the spans of one rank as a trace file that opens on its own and merges with others.

    Args:
        path: the file, replaced whole; its folder is made when missing.
        rank: the rank.
        spans: of one step or of several, in any order, recorded in this process.
    """
    # perf_counter has no common zero: the wall clock ties ranks and hosts together.
    wall_offset_ns = time.time_ns() - time.perf_counter_ns()
    origin_ns = min((span.start_ns for span in spans), default=0)
    events = [*_names(rank), *(_event(span, rank=rank, origin_ns=origin_ns) for span in spans)]
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"origin_unix_ns": origin_ns + wall_offset_ns},
    }
    write_json_atomic(path, trace)


def merge_steps(folder: Path) -> list[Path]:
    """Merge `step-N.rank-R.json` of all ranks into `step-N.json`, for each traced step.

    Args:
        folder: of the traces; need not exist.

    Returns:
        The files written.
    """
    steps: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("step-*.rank-*.json")):
        steps.setdefault(path.name.partition(".rank-")[0], []).append(path)
    targets = []
    for name, paths in steps.items():
        merge_traces(paths, target=folder / f"{name}.json")
        targets.append(folder / f"{name}.json")
    return targets


def merge_traces(paths: Iterable[Path], *, target: Path) -> None:
    """Put the traces of several ranks on one time axis.

    Args:
        paths: files of `write_trace`, at least one.
        target: the file to write.
    """
    traces = [json.loads(path.read_bytes()) for path in paths]
    origins_ns = [int(trace["otherData"]["origin_unix_ns"]) for trace in traces]
    origin_ns = min(origins_ns)
    events: list[dict[str, Any]] = []
    for trace, own_origin_ns in zip(traces, origins_ns, strict=True):
        shift_us = (own_origin_ns - origin_ns) / 1e3
        for event in trace["traceEvents"]:
            moved = {"ts": event["ts"] + shift_us} if "ts" in event else {}
            events.append({**event, **moved})
    merged = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"origin_unix_ns": origin_ns},
    }
    write_json_atomic(target, merged)


def _names(rank: int) -> list[dict[str, Any]]:
    process = {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
    order = {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
    tracks = [
        {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": track}}
        for tid, track in enumerate(TRACKS)
    ]
    return [process, order, *tracks]


def _event(span: TracedSpan, *, rank: int, origin_ns: int) -> dict[str, Any]:
    action = span.action
    track = _TRACK_OF_PREFIX.get(action.op[:4], "compute")
    return {
        "ph": "X",
        "pid": rank,
        "tid": TRACKS.index(track),
        "name": str(action),
        "cat": track,
        "ts": (span.start_ns - origin_ns) / 1e3,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "args": {"stage": action.stage, "op": str(action.op), "microbatch": action.microbatch},
    }
