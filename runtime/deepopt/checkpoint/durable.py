"""Files and folders that survive a power cut: write, fsync, rename, remove.

Every `OSError` becomes a `CheckpointError` that names the file and the errno. This module
knows nothing of checkpoints.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deepopt.checkpoint.manifest import new_digest
from deepopt.errors import CheckpointError
from deepopt.telemetry import files

BLOCK_BYTES = (
    4 << 20
)  # hashed and written at once: large enough to be fast, small enough for cache

_REMEDIES = {
    errno.ENOSPC: "free space there, or set checkpoint.directory to a larger disk",
    errno.EDQUOT: "free space in the quota, or set checkpoint.directory to another disk",
    errno.EROFS: "remount it writable, or set checkpoint.directory to a writable disk",
    errno.EACCES: "make it writable, or set checkpoint.directory to a writable folder",
    errno.EIO: "the disk reports errors: look at the kernel log, use another disk",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """What was written.

    Args:
        size_bytes: size of the file.
        digest: 128-bit hash of the bytes handed to the disk, hexadecimal.
    """

    size_bytes: int
    digest: str


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a `CheckpointError`.

    Args:
        doing: the verb, for example `write`.
        path: what it is done to.
    """
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "unknown errno")
        raise CheckpointError(
            f"cannot {doing} {path}: {error.strerror} ({code})",
            remedy=_REMEDIES.get(error.errno or 0, ""),
        ) from error


def write_file(path: Path, *, pieces: Iterable[bytes | memoryview]) -> WrittenFile:
    """Write a file and fsync it; after an error no part of it remains.

    Args:
        path: the file; replaced when it exists.
        pieces: the content in order, each a flat run of bytes.

    Raises:
        CheckpointError: the disk refused.
    """
    digest = new_digest()
    size_bytes = 0
    with explained("write", path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            try:
                for piece in pieces:
                    view = memoryview(piece)
                    for start in range(0, len(view), BLOCK_BYTES):
                        block = view[start : start + BLOCK_BYTES]
                        digest.update(block)
                        _write_all(descriptor, block)
                    size_bytes += len(view)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
    return WrittenFile(size_bytes=size_bytes, digest=digest.hexdigest())


def _write_all(descriptor: int, block: memoryview) -> None:
    while len(block):
        block = block[os.write(descriptor, block) :]


def hash_file(path: Path) -> WrittenFile:
    """Size and hash of a file as it lies on disk."""
    digest = new_digest()
    size_bytes = 0
    with explained("read", path), path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return WrittenFile(size_bytes=size_bytes, digest=digest.hexdigest())


def make_directory(path: Path) -> None:
    """Make a folder and its parents; fine when it is there."""
    with explained("make", path):
        if path.is_dir():
            return
        path.mkdir(parents=True, exist_ok=True)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make the names inside a folder durable."""
    with explained("fsync", path):
        files.fsync_directory(path)


def put_directory(source: Path, *, target: Path, aside: Path) -> bool:
    """Rename a folder to its final name, durably; what was there goes aside first.

    At each moment a whole folder is at `target` or at `aside`.

    Args:
        source: the new folder, with all of its content fsynced.
        target: its final name, in the same parent.
        aside: where the folder that was at `target` goes; must not exist.

    Returns:
        Whether there is a folder at `aside` now, for the caller to remove.
    """
    with explained(f"rename {source} to", target):
        replaced = target.exists()
        if replaced:
            target.rename(aside)
        try:
            source.rename(target)
        except OSError:
            if replaced:
                aside.rename(target)
            raise
    fsync_directory(target.parent)
    return replaced


def remove_directory(path: Path, *, trash: Path) -> None:
    """Remove a folder so that no half of it is ever found under its own name.

    Args:
        path: the folder.
        trash: name that it has while it goes; what is there goes too.
    """
    with explained("remove", path):
        if path != trash:
            if trash.exists():
                shutil.rmtree(trash)
            path.rename(trash)
        shutil.rmtree(trash)
