"""Pickles what a script brings along into a file with a hash, and reads it back.

cloudpickle, which Ray brings, takes what is defined in `__main__` or in a notebook by value. A file is
read only by who has its hash: the job of the run directory that it lies in.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepopt.checkpoint.durable import write_file
from deepopt.errors import InputError

Pickler = Callable[[io.BytesIO], Any]


def dump_object(value: Any, path: Path, *, what: str) -> dict[str, str]:
    """Pickle an object into a file, durably.

    Args:
        value: anything that can be pickled.
        path: the file.
        what: the object's name in errors, for example `the dataset`.

    Returns:
        `file` and `sha256`: arguments of the functions in `deepopt.carried`.

    Raises:
        InputError: it cannot be pickled; says which part.
    """
    content = to_bytes(value, what=what)
    write_file(path, pieces=[content])
    return {"file": str(path), "sha256": hashlib.sha256(content).hexdigest()}


def to_bytes(value: Any, *, what: str, make_pickler: Pickler | None = None) -> bytes:
    """Pickle an object.

    Args:
        value: anything that can be pickled.
        what: its name in errors.
        make_pickler: of a buffer; None: cloudpickle's own.

    Raises:
        InputError: it cannot be pickled; says which part.
    """
    make = make_pickler or _make_pickler
    buffer = io.BytesIO()
    try:
        make(buffer).dump(value)
    except Exception as error:  # any object may raise anything
        part = _unpicklable_part(value, make)
        where = f"{what}{part}"
        raise InputError(
            f"{where} cannot be carried to the workers: {_first_line(error)}",
            remedy="open files, connections, locks and generators where they are used: in "
            "__getitem__, __iter__ or forward, not before; or keep them out of the pickle with "
            "__getstate__",
        ) from error
    return buffer.getvalue()


def read_bytes(file: str, *, sha256: str) -> bytes:
    """The content of a file whose hash is known.

    Raises:
        InputError: it is gone, or another one.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {file}, which the script of this run wrote: {error.strerror}",
            remedy="move the run directory back to where it was, or start the script again",
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(
            f"{file} is not the file that the script of this run wrote: its hash differs",
            remedy="restore it from a copy, or start the script again",
        )
    return content


def load_object(file: str, *, sha256: str) -> Any:
    """Read an object back.

    Args:
        file: written by `dump_object`.
        sha256: that it returned.

    Raises:
        InputError: the file is gone or another one, or what it needs is not importable here.
    """
    return from_bytes(read_bytes(file, sha256=sha256), source=file)


def from_bytes(
    content: bytes, *, source: str, load: Callable[[io.BytesIO], Any] | None = None
) -> Any:
    """Unpickle.

    Args:
        content: what `to_bytes` gave.
        source: its file, for errors.
        load: unpickles a buffer; None: as pickle does.

    Raises:
        InputError: what it needs is not importable here.
    """
    try:
        return (load or pickle.load)(io.BytesIO(content))
    except ImportError as error:
        raise InputError(
            f"{source} needs {error.name or 'a module'} that this process cannot import: {error}",
            remedy="install it on every host, or put its folder on PYTHONPATH",
        ) from error
    except AttributeError as error:
        raise InputError(
            f"{source} needs something that a module no longer has: {error}",
            remedy="restore the code that the script was started with",
        ) from error


def _make_pickler(buffer: io.BytesIO) -> Any:
    from ray import cloudpickle

    make: Any = cloudpickle.CloudPickler  # has no types
    return make(buffer)


def _unpicklable_part(value: Any, make: Pickler, depth: int = 3) -> str:
    """The attribute or entry that cannot be pickled, as it would be written: `.lock`, `['file']`."""
    if depth == 0:
        return ""
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(f"[{key!r}]", entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"[{index}]", entry) for index, entry in enumerate(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        parts = [(f".{name}", entry) for name, entry in vars(value).items()]
    for name, entry in parts:
        try:
            make(io.BytesIO()).dump(entry)
        except Exception:  # noqa: BLE001 - any object may raise anything
            return name + _unpicklable_part(entry, make, depth - 1)
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
