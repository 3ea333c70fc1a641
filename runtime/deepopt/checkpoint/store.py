"""The checkpoint folder of one job: begin, commit, find, retire.

Only this room writes there. Workers call `begin` and `write_layer`; the head alone calls
`commit`, `discard`, `retire` and `sweep`. Folder names are in `folders`, what layers look like
in files is `layer_files`' business, and when to checkpoint the worker's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from deepopt.checkpoint import layer_files
from deepopt.checkpoint.durable import (
    explained,
    fsync_directory,
    make_directory,
    put_directory,
    remove_directory,
    write_file,
)
from deepopt.checkpoint.folders import (
    FolderKind,
    aside_path,
    committed_path,
    list_folders,
    trash_path,
    work_path,
)
from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import Manifest, ShardEntry, check_complete
from deepopt.checkpoint.verification import Found, Rejected, VerifiedOnce, verify
from deepopt.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Checkpoints of one job in one folder.

    Args:
        root: the folder; made when the first checkpoint begins.
        keep: verified checkpoints that retention leaves; at least 2, so that a damaged one
            always has one before it.

    Raises:
        CheckpointError: `keep` is less than 2.
    """

    def __init__(self, root: Path, keep: int = 2) -> None:
        if keep < 2:
            raise CheckpointError(
                f"checkpoint.keep is {keep}",
                remedy="keep at least 2, so that a damaged one has one before it",
            )
        self._root = root
        self._keep = keep
        self._verified = VerifiedOnce()

    @property
    def root(self) -> Path:
        """The folder of all checkpoints."""
        return self._root

    def begin(self, step: int, generation: int) -> Path:
        """Make the work folder of a checkpoint; every writer may call it.

        Args:
            step: optimizer steps done.
            generation: the writer's worker group.
        """
        path = work_path(self._root, step=step, generation=generation)
        make_directory(self._root)
        make_directory(path)
        return path

    def write_layer(
        self, step: int, generation: int, state: LayerState, writer: int
    ) -> ShardEntry:
        """Write one layer's state into the work folder, fsynced.

        Args:
            step: as in `begin`.
            generation: as in `begin`.
            state: CPU tensors that nobody changes meanwhile.
            writer: rank that writes.

        Raises:
            CheckpointError: the disk refused, or the work folder was swept away because a newer
                generation has begun. Nothing of the file remains.
        """
        folder = work_path(self._root, step=step, generation=generation)
        return layer_files.write_layer(
            folder, state=state, writer=writer, step=step, generation=generation
        )

    def commit(self, manifest: Manifest) -> Path:
        """Make a checkpoint whose shards are all written the committed one of its step.

        One that is committed already is replaced: until the new one has its name, the old one
        is found. A repeated call changes nothing.

        Args:
            manifest: lists every shard; its plan says which layers must be there.

        Returns:
            The committed folder.

        Raises:
            CheckpointError: a layer, a slice or a file is missing, a newer generation has
                committed this step, or the disk refused. What was committed before stays so.
        """
        check_complete(manifest, manifest.layer_names)
        step, generation = manifest.step, manifest.generation
        work = work_path(self._root, step=step, generation=generation)
        final = committed_path(self._root, step=step)
        committed = _readable_manifest(final)
        if committed is not None and committed.generation > generation:
            raise CheckpointError(
                f"step {step} was committed by generation {committed.generation}, "
                f"generation {generation} is stale"
            )
        if committed == manifest and not work.exists():
            fsync_directory(self._root)  # the first call may have failed at just this
            return final
        for entry in manifest.shards:
            path = work / entry.file
            with explained("find", path):
                size_bytes = path.stat().st_size
            if size_bytes != entry.size_bytes:
                raise CheckpointError(
                    f"{path} has {size_bytes} bytes, its writer said {entry.size_bytes}"
                )
        fsync_directory(work)
        write_file(work / layer_files.MANIFEST_NAME, pieces=[manifest.to_json().encode()])
        fsync_directory(work)
        aside = aside_path(self._root, step=step, generation=generation)
        if aside.exists():  # left by an earlier try of this generation
            self._settle(aside, final=final)
        if put_directory(work, target=final, aside=aside):
            try:
                _remove(aside)
            except CheckpointError as error:  # the commit stands; `sweep` tries again
                logger.warning("the replaced checkpoint stays: %s", error.message)
        return final

    def discard(self, step: int, generation: int) -> None:
        """Remove the work folder of a checkpoint that failed, to give its space back.

        Args:
            step: as in `begin`.
            generation: as in `begin`.
        """
        work = work_path(self._root, step=step, generation=generation)
        if work.exists():
            _remove(work)

    def checkpoints(self) -> list[Path]:
        """Committed folders, newest first, verified or not.

        One that was moved aside comes after its replacement; `sweep` gives it its name back or
        removes it, so sweep first, then look.
        """
        readable = [
            folder
            for folder in list_folders(self._root)
            if folder.kind in (FolderKind.COMMITTED, FolderKind.ASIDE)
        ]
        readable.sort(
            key=lambda folder: (
                folder.step,
                folder.kind is FolderKind.COMMITTED,
                folder.generation,
            ),
            reverse=True,
        )
        return [folder.path for folder in readable]

    def newest_verified(self, skeleton_fingerprint: str | None = None) -> Found | None:
        """The newest checkpoint whose every byte is as it was written.

        Args:
            skeleton_fingerprint: of the model that will load it; None: any.

        Returns:
            None when there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints and none can be used; the message has the
                reason of each.
        """
        rejected: list[Rejected] = []
        for path in self.checkpoints():
            try:
                manifest = verify(path, skeleton_fingerprint=skeleton_fingerprint)
            except CheckpointError as error:
                rejected.append(Rejected(path=path, reason=error.message))
                continue
            return Found(path=path, manifest=manifest, rejected=tuple(rejected))
        if rejected:
            reasons = "; ".join(f"{one.path.name}: {one.reason}" for one in rejected)
            raise CheckpointError(
                f"no checkpoint in {self._root} can be used, of {len(rejected)}: {reasons}",
                remedy="restore one from a copy, or start a new run directory",
            )
        return None

    def verify(self, path: Path) -> Manifest:
        """Read every byte of a checkpoint; see `verification.verify`."""
        return verify(path)

    def read_layer(self, path: Path, manifest: Manifest, layer: str) -> LayerState:
        """One layer, whole; see `layer_files.read_layer`."""
        return layer_files.read_layer(path, manifest=manifest, layer=layer)

    def read_tensors(
        self, path: Path, manifest: Manifest, keys: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """Single tensors, whole; see `layer_files.read_keys`."""
        return layer_files.read_keys(path, manifest=manifest, keys=keys)

    def retire(self) -> list[Path]:
        """Keep the newest verified checkpoints, as many as `keep` says, and remove older ones.

        Also removes work folders that the newest verified checkpoint has overtaken: writers
        work in the order of steps, so those will never be whole.

        Returns:
            What was removed.
        """
        kept: list[Manifest] = []
        surplus: list[Path] = []
        for path in self.checkpoints():
            if len(kept) == self._keep:
                surplus.append(path)
            elif (manifest := self._verified.manifest(path)) is None:
                continue  # damaged and not old enough to go: someone may want to look at it
            elif any(manifest.step == one.step for one in kept):
                surplus.append(path)
            else:
                kept.append(manifest)
        for folder in list_folders(self._root) if kept else []:
            overtaken = folder.step < kept[0].step and folder.generation <= kept[0].generation
            if folder.kind is FolderKind.IN_WORK and overtaken:
                surplus.append(folder.path)
        for path in surplus:
            _remove(path)
        return surplus

    def sweep(self, current_generation: int) -> list[Path]:
        """Clear what crashes left: stale work folders, halves of removals and of replacements.

        Args:
            current_generation: work folders of older ones are removed.

        Returns:
            What was removed.
        """
        removed: list[Path] = []
        for folder in list_folders(self._root):
            stale = folder.kind is FolderKind.IN_WORK and folder.generation < current_generation
            if stale or folder.kind is FolderKind.TRASH:
                _remove(folder.path)
                removed.append(folder.path)
            elif folder.kind is FolderKind.ASIDE:
                final = committed_path(self._root, step=folder.step)
                removed += self._settle(folder.path, final=final)
        return removed

    def _settle(self, aside: Path, *, final: Path) -> list[Path]:
        """Leave one of a checkpoint and its replacement, under the final name.

        Returns:
            What was removed.
        """
        removed = []
        if final.exists():
            only_aside_is_whole = (
                self._verified.manifest(final) is None
                and self._verified.manifest(aside) is not None
            )
            removed.append(final if only_aside_is_whole else aside)
            _remove(removed[0])
        if aside.exists():
            put_directory(aside, target=final, aside=aside)
        return removed


def _remove(path: Path) -> None:
    remove_directory(path, trash=trash_path(path))


def _readable_manifest(folder: Path) -> Manifest | None:
    try:
        return layer_files.read_manifest(folder)
    except CheckpointError:
        return None
