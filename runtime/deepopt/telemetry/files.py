"""JSON on disk: lines that are appended and followed while they grow, and files replaced whole.

A process that dies in the middle of a line leaves a cut one: readers leave it out, and the next
writer removes it. JSON has no NaN and no infinity: both are written as null. This module knows
nothing of what the lines mean.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deepopt.errors import RunDirectoryError

_TAIL_BYTES = 1 << 16  # first look for the start of a cut line; lines are far shorter


def encode(value: object) -> str:
    """JSON on one line; floats so that they read back bit for bit, NaN and infinity as null.

    Args:
        value: mappings, sequences, strings, numbers, paths; anything else by its `str`.
    """
    return json.dumps(_plain(value), separators=(", ", ": "), allow_nan=False, default=str)


class JsonLinesWriter:
    """Appends JSON objects to a file, one line and one system call each.

    Args:
        path: the file; made with its folder when missing. A cut last line is removed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        try:
            _repair(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, record: Mapping[str, object]) -> None:
        """Append one object.

        Raises:
            OSError: the disk refused; nothing of the line remains.
        """
        line = memoryview((encode(record) + "\n").encode())
        rest = line
        try:
            while len(rest):
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:  # a disk that is nearly full takes a part of it
            size = os.fstat(self._descriptor).st_size
            os.ftruncate(self._descriptor, size - (len(line) - len(rest)))
            raise

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class JsonLinesTail:
    """Reads a growing file of JSON lines, each line once.

    Args:
        path: the file; need not exist yet.
        at_end: leave out the lines that are there now.
    """

    def __init__(self, path: Path, *, at_end: bool = False) -> None:
        self._path = path
        self._offset = 0
        self._line = 0
        if at_end:
            self.read_new()

    def read_new(self) -> list[dict[str, Any]]:
        """The whole lines that came since the last call.

        Raises:
            RunDirectoryError: a whole line is not a JSON object.
        """
        try:
            if self._path.stat().st_size == self._offset:  # as a rule: nothing is new
                return []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = []
        for line in whole.splitlines():
            self._line += 1
            if line.strip():
                records.append(_decode(line, where=f"{self._path}:{self._line}"))
        return records


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All objects of a file of JSON lines; a cut last line is left out, no file is no lines.

    Raises:
        RunDirectoryError: a line other than the last is damaged.
    """
    return JsonLinesTail(path).read_new()


def write_json_atomic(path: Path, value: object, *, durable: bool = False) -> None:
    """Replace a JSON file so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is made when missing.
        value: as for `encode`.
        durable: on disk before this returns.
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False, default=str) + "\n"
    write_text_atomic(path, text, durable=durable)


def write_text_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a text file so that a reader sees the old one or the new one, never a part.

    Args:
        path: the file; its folder is made when missing.
        text: written as UTF-8.
        durable: on disk before this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    if durable:
        fsync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RunDirectoryError: the file is missing, or not a JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RunDirectoryError(f"{path} does not exist") from None
    except OSError as error:
        raise RunDirectoryError(f"cannot read {path}: {error.strerror}") from error
    return _decode(content, where=str(path))


def _decode(content: bytes, *, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RunDirectoryError(
            f"{where} is not a JSON object: {content[:80].decode(errors='replace')!r}",
            remedy="the file was damaged or written by something else; move it away",
        )
    return value


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    return value


def _repair(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    reach = _TAIL_BYTES
    while True:
        start = max(0, size - reach)
        tail = os.pread(descriptor, size - start, start)
        newline = tail.rfind(b"\n")
        if newline >= 0 or start == 0:
            break
        reach *= 2
    cut = tail[newline + 1 :]
    if not cut:
        return
    try:
        whole = isinstance(json.loads(cut), dict)
    except ValueError:
        whole = False
    if whole:  # only the newline is missing
        os.write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, size - len(cut))


def fsync_directory(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
