"""Text from files: found, sorted, read as bytes. Does not tokenize and does not cut into
sequences.

The default text is the Python standard library's own sources, which every machine that can run
this has.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepopt.errors import InputError

STANDARD_LIBRARY_LIMIT_BYTES = 16 * 2**20  # the whole of 3.11 to 3.13 fits; later ones are cut

_NOT_TEXT_OF_THE_LIBRARY = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Files and what is in them.

    Args:
        names: path of each file, for errors.
        parts: bytes of each file.
        description: for people: what and how much.
    """

    names: tuple[str, ...]
    parts: tuple[bytes, ...]
    description: str

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.parts))

    def fingerprint(self) -> str:
        """Hash of the content and of where files end; not of their names."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()[:32]


def read_files(patterns: Sequence[str]) -> Text:
    """Read all files that paths and globs name, each once, in the order of their absolute
    paths.

    Args:
        patterns: paths and globs, `**` and `~` too; relative ones start at the working
            directory.

    Raises:
        InputError: a pattern matches no file, a file cannot be read, or there is no text.
    """
    paths = sorted({path for pattern in patterns for path in _matches(pattern)})
    parts = tuple(_read(path) for path in paths)
    size_bytes = sum(map(len, parts))
    if size_bytes == 0:
        raise InputError(
            f"data.files: the {len(paths)} file(s) that {', '.join(patterns)} matched are empty",
            remedy="name files with text in them",
        )
    return Text(
        names=tuple(map(str, paths)),
        parts=parts,
        description=f"{len(paths)} file(s) of {', '.join(patterns)}, {size_bytes:,} bytes",
    )


def read_standard_library(
    *, root: Path | None = None, limit_bytes: int = STANDARD_LIBRARY_LIMIT_BYTES
) -> Text:
    """Read the `.py` sources of this Python's standard library, without its tests and without
    installed packages.

    Args:
        root: its folder; None: ask the interpreter.
        limit_bytes: stop before the first file, in the order of paths, that would exceed it.

    Raises:
        InputError: this Python has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    names, parts, size_bytes, cut = [], [], 0, False
    for path in sorted(_library_sources(root), key=lambda p: p.relative_to(root).parts):
        part = _read(path)
        if size_bytes + len(part) > limit_bytes:
            cut = True
            break
        names.append(str(path))
        parts.append(part)
        size_bytes += len(part)
    if size_bytes == 0:
        raise InputError(
            f"the default text is missing: no Python sources in {root}",
            remedy="name text files in data.files",
        )
    extent = f"the first {size_bytes:,} bytes" if cut else f"{size_bytes:,} bytes"
    return Text(
        names=tuple(names),
        parts=tuple(parts),
        description=f"sources of the Python {platform.python_version()} standard library without "
        f"tests, {len(parts)} files, {extent}",
    )


def _library_sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _NOT_TEXT_OF_THE_LIBRARY]  # do not go in
        yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _matches(pattern: str) -> list[Path]:
    try:
        expanded = Path(pattern).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"data.files: {pattern!r}: {error}", remedy="write the path out"
        ) from error
    # Path.glob refuses absolute patterns.
    names = glob.glob(str(expanded), recursive=True)  # noqa: PTH207
    found = [Path(name).absolute() for name in names]
    if expanded.exists():  # a name that contains [ or ? itself
        found.append(expanded.absolute())
    files = [path for path in found if path.is_file()]
    if not files:
        folders = [path for path in found if path.is_dir()]
        raise InputError(
            f"data.files: {pattern!r} matches no file"
            + (
                f", only the folder {folders[0]}" if folders else f" (looked from {Path.cwd()})"
            ),
            remedy=f"write {pattern.rstrip('/')}/**/*.txt for the files in it"
            if folders
            else "check the path, and that every host sees it",
        )
    return files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"data.files: cannot read {path}: {error.strerror}",
            remedy="make it readable, or leave it out",
        ) from error
