"""Whether a committed checkpoint is exactly what was written. Reads, never writes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from deepopt.checkpoint.durable import explained, hash_file
from deepopt.checkpoint.folders import parse
from deepopt.checkpoint.layer_files import MANIFEST_NAME, read_manifest
from deepopt.checkpoint.manifest import Manifest, check_complete
from deepopt.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A checkpoint that cannot be used.

    Args:
        path: its folder.
        reason: what is wrong with it, in one line.
    """

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A verified checkpoint.

    Args:
        path: its folder.
        manifest: its manifest.
        rejected: newer ones that were passed over, newest first.
    """

    path: Path
    manifest: Manifest
    rejected: tuple[Rejected, ...]


def verify(path: Path, *, skeleton_fingerprint: str | None = None) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest.

    Args:
        path: a committed folder.
        skeleton_fingerprint: of the model that will load it; None: any.

    Raises:
        CheckpointError: what is wrong, the first thing found.
    """
    manifest = read_manifest(path)
    folder = parse(path)
    if folder is None or folder.step != manifest.step:
        raise CheckpointError(f"{path} has the manifest of step {manifest.step}")
    if skeleton_fingerprint not in (None, manifest.skeleton_fingerprint):
        raise CheckpointError(
            f"{path} is of another model: its skeleton is {manifest.skeleton_fingerprint}, "
            f"the job's is {skeleton_fingerprint}",
            remedy="resume with the model that wrote it, or start a new run directory",
        )
    check_complete(manifest, manifest.layer_names)
    for entry in manifest.shards:
        file = path / entry.file
        found = hash_file(file)
        if found.size_bytes != entry.size_bytes:
            raise CheckpointError(
                f"{file} has {found.size_bytes} bytes, the manifest says {entry.size_bytes}"
            )
        if found.digest != entry.digest:
            raise CheckpointError(
                f"{file} is damaged: its hash is {found.digest}, "
                f"the manifest says {entry.digest}"
            )
    return manifest


class VerifiedOnce:
    """Verifies a folder and remembers it for as long as its files look untouched.

    Spares retention from reading a checkpoint again after each new one. What is to be loaded
    is verified in full.
    """

    def __init__(self) -> None:
        self._stamps: dict[Path, tuple[tuple[int, int], ...]] = {}

    def manifest(self, path: Path) -> Manifest | None:
        """The manifest of a verified checkpoint; None, and a warning, when it is no such."""
        try:
            manifest = read_manifest(path)
            stamps = _stamps(path, manifest=manifest)
            if self._stamps.get(path) != stamps:
                verify(path)
                self._stamps[path] = stamps
        except CheckpointError as error:
            logger.warning("checkpoint %s cannot be used: %s", path, error.message)
            self._stamps.pop(path, None)
            return None
        return manifest


def _stamps(path: Path, *, manifest: Manifest) -> tuple[tuple[int, int], ...]:
    stamps = []
    for name in (MANIFEST_NAME, *(entry.file for entry in manifest.shards)):
        with explained("find", path / name):
            status = (path / name).stat()
        stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)
