"""Names of checkpoint folders and what they mean. Lists a folder, changes nothing.

| name | meaning |
|---|---|
| `step-00000050/` | committed: all of it was on disk before it got this name |
| `step-00000050.gen3.tmp/` | in work by generation 3; never read |
| `step-00000050.gen4.old/` | moved aside while generation 4 replaces it; read if need be |
| any of them and `.trash/` | on its way out |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from deepopt.checkpoint.durable import explained

_NAME = re.compile(
    r"step-(?P<step>\d{8,})(\.gen(?P<generation>\d+)\.(?P<kind>tmp|old))?(?P<trash>\.trash)?"
)


class FolderKind(StrEnum):
    """What a folder is; the value is the end of its name."""

    COMMITTED = ""
    IN_WORK = "tmp"
    ASIDE = "old"
    TRASH = "trash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """One folder of the store, by its name.

    Args:
        path: where it is.
        kind: what it is.
        step: optimizer steps done.
        generation: the one in its name; 0 when there is none.
    """

    path: Path
    kind: FolderKind
    step: int
    generation: int


def committed_path(root: Path, *, step: int) -> Path:
    """The folder of a committed checkpoint."""
    return root / f"step-{step:08d}"


def work_path(root: Path, *, step: int, generation: int) -> Path:
    """The folder that the writers of a generation fill."""
    return root / f"step-{step:08d}.gen{generation}.{FolderKind.IN_WORK}"


def aside_path(root: Path, *, step: int, generation: int) -> Path:
    """Where a committed checkpoint goes while that generation replaces it."""
    return root / f"step-{step:08d}.gen{generation}.{FolderKind.ASIDE}"


def trash_path(path: Path) -> Path:
    """The name of a folder on its way out."""
    return path.with_name(path.name.removesuffix(".trash") + ".trash")


def parse(path: Path) -> Folder | None:
    """What a folder is, by its name; None when it is none of the store's."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return None
    return Folder(
        path=path,
        kind=FolderKind("trash" if match["trash"] else match["kind"] or ""),
        step=int(match["step"]),
        generation=int(match["generation"] or 0),
    )


def list_folders(root: Path) -> list[Folder]:
    """The store's folders, by name; none when the root does not exist."""
    if not root.is_dir():
        return []
    with explained("list", root):
        paths = sorted(root.iterdir())
    return [folder for path in paths if (folder := parse(path)) is not None]
