"""The journal: what the head decided, one fsynced JSON line a decision, written beforehand.

`Journal.append` returns when the line is on disk. `read_journal` forgives a last line that was
cut off by a crash (what it announced did not happen) and refuses damage anywhere else. `replay`
folds entries into what a resumed job needs to know.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deepopt.clock import utc_now
from deepopt.errors import RunDirectoryError
from deepopt.pipeline.weight_ways import Verdict, WaysByConditions
from deepopt.telemetry.files import fsync_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One decision.

    Args:
        seq: 1-based position in the journal.
        time: date and time for people.
        kind: `job`, `plan`, `generation`, `checkpoint`, `state`, `stop`, `fault`,
            `recovered`, `device_lost`, `weight_work` or `head`.
        fields: what was decided.
    """

    seq: int
    time: str
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalContent:
    """What a journal file holds.

    Args:
        entries: whole lines, in order.
        size_bytes: length of the file up to the end of the last whole line.
        cut_bytes: bytes of a cut-off last line after that.
    """

    entries: tuple[Entry, ...]
    size_bytes: int
    cut_bytes: int


def read_journal(path: Path) -> JournalContent:
    """Read a journal; a missing file is an empty one.

    Raises:
        RunDirectoryError: a line other than a cut-off last one is damaged or out of order.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return JournalContent(entries=(), size_bytes=0, cut_bytes=0)
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror}") from error
    size_bytes = content.rfind(b"\n") + 1
    entries = []
    for number, line in enumerate(content[:size_bytes].splitlines(), start=1):
        entry = _parse(line)
        if entry is None or entry.seq != number:
            found = "is damaged" if entry is None else f"has seq {entry.seq}, expected {number}"
            raise RunDirectoryError(
                f"{path}:{number}: the journal's line {found}",
                remedy="restore the file from a copy, or start a new run directory; "
                "checkpoints in this one stay usable",
            )
        entries.append(entry)
    return JournalContent(
        entries=tuple(entries), size_bytes=size_bytes, cut_bytes=len(content) - size_bytes
    )


def _parse(line: bytes) -> Entry | None:
    try:
        fields = json.loads(line)
        return Entry(
            seq=fields.pop("seq"),
            time=fields.pop("time"),
            kind=fields.pop("kind"),
            fields=fields,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


class Journal:
    """The one writer of a journal; a cut-off last line is removed when it opens.

    Args:
        path: the file; made when it is missing.

    Raises:
        RunDirectoryError: the file is damaged or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        content = read_journal(path)
        self.entries: list[Entry] = list(content.entries)
        self.cut_bytes = content.cut_bytes
        try:
            self._descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            if content.cut_bytes:
                os.ftruncate(self._descriptor, content.size_bytes)
            os.fsync(self._descriptor)
            fsync_directory(path.parent)
        except OSError as error:
            raise RunDirectoryError(f"cannot open {path}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def append(self, kind: str, **fields: Any) -> Entry:
        """Write a decision and wait until it is on disk.

        Args:
            kind: see `Entry`.
            **fields: JSON-ready values.

        Raises:
            RunDirectoryError: the disk refused; nothing of the line remains.
        """
        entry = Entry(seq=len(self.entries) + 1, time=utc_now(), kind=kind, fields=fields)
        line = json.dumps({"seq": entry.seq, "time": entry.time, "kind": kind, **fields})
        size_bytes = os.fstat(self._descriptor).st_size
        try:
            rest = memoryview(line.encode() + b"\n")
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, size_bytes)
            raise RunDirectoryError(
                f"cannot write {self._path}: {error.strerror}",
                remedy="free space or make the run directory writable, then `deepopt resume`",
            ) from error
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        """Close the file; a repeated call is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What a journal says about the job so far.

    Args:
        job_id: None when nothing was journaled yet.
        generation: the newest one formed; 0 before the first.
        plan_id: the newest plan; 0 before the first.
        wanted: the plan since the last launch or resume that has all workers; None: not told.
        plan: the plan of the newest generation; None: not told.
        places: index of the place of each rank of that plan; empty: each rank's own.
        shrunk: when the job shrank since the last launch or resume, as `Entry.time`.
        lost_devices: when each place lost its device since then, by generation, as `Entry.time`.
        state: the last state; empty before the first.
        checkpoint_step: step of the newest checkpoint announced; 0 for none.
        checkpoint_path: its folder; None for none.
        faults: the last word on each fault, by its number.
        counting: numbers of the faults since the last launch or resume: those that count.
        weight_ways: how weight gradients are computed, as workers of all launches found it out.
    """

    job_id: str | None = None
    generation: int = 0
    plan_id: int = 0
    wanted: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    places: tuple[int, ...] = ()
    shrunk: tuple[str, ...] = ()
    lost_devices: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    state: str = ""
    checkpoint_step: int = 0
    checkpoint_path: str | None = None
    faults: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    counting: frozenset[int] = frozenset()
    weight_ways: WaysByConditions = field(default_factory=dict)


def replay(entries: Iterable[Entry]) -> History:
    """Fold a journal's entries into the job's history."""
    job_id: str | None = None
    generation = plan_id = checkpoint_step = 0
    state = ""
    checkpoint_path: str | None = None
    faults: dict[int, Mapping[str, Any]] = {}
    counting: set[int] = set()
    plans: dict[int, Mapping[str, Any]] = {}  # fields of their entries
    of_generation = wanted_id = 0
    shrunk: list[str] = []
    lost_devices: dict[int, dict[int, str]] = {}
    weight_ways: dict[str, dict[str, Verdict]] = {}
    for entry in entries:
        if entry.kind == "job":
            job_id = entry.fields["job_id"]
            counting.clear()
            shrunk.clear()
            lost_devices.clear()
            wanted_id = 0
        elif entry.kind == "generation":
            generation = entry.fields["generation"]
            of_generation = entry.fields.get("plan_id", 0)
        elif entry.kind == "plan":
            plan_id = entry.fields["plan_id"]
            plans[plan_id] = entry.fields
            wanted_id = wanted_id or plan_id
            if entry.fields.get("shrunk"):
                shrunk.append(entry.time)
        elif entry.kind == "device_lost":
            lost_in = entry.fields.get("generation", generation)
            lost_devices.setdefault(entry.fields["place"], {}).setdefault(lost_in, entry.time)
        elif entry.kind == "weight_work":
            known = weight_ways.setdefault(entry.fields["conditions"], {})
            known |= {n: Verdict.from_json(v) for n, v in entry.fields["ways"].items()}
        elif entry.kind == "state":
            state = entry.fields["state"]
        elif entry.kind == "checkpoint":
            if entry.fields["step"] >= checkpoint_step:
                checkpoint_step = entry.fields["step"]
                checkpoint_path = entry.fields.get("path")
        elif entry.kind in ("fault", "recovered"):
            fault = entry.fields["fault"]
            faults[fault["number"]] = fault
            counting.add(fault["number"])
    return History(
        job_id=job_id,
        generation=generation,
        plan_id=plan_id,
        wanted=plans.get(wanted_id, {}).get("plan"),
        plan=plans.get(of_generation, {}).get("plan"),
        places=tuple(plans.get(of_generation, {}).get("places") or ()),
        shrunk=tuple(shrunk),
        lost_devices=lost_devices,
        state=state,
        checkpoint_step=checkpoint_step,
        checkpoint_path=checkpoint_path,
        faults=faults,
        counting=frozenset(counting),
        weight_ways=weight_ways,
    )
