"""A child process per call that changes the disk, killed at just that call.

Run as a script with an empty folder; prints one JSON line per killed child. Every child is
forked from this process, which has torch loaded and no threads, so that they are cheap.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepopt.checkpoint.store import CheckpointStore
from support.checkpoints import assert_same_state, commit_step, make_states

CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir")


def kill_at(number: int) -> None:
    """Make the `number`-th call of those that change the disk the last thing this process does.

    A write is cut in half.
    """
    count = 0

    def hooked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **named)
            count += 1
            if count == number:
                if name == "write":
                    descriptor, block = arguments
                    real(descriptor, bytes(block)[: len(block) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, hooked(name, getattr(os, name)))


def train(root: Path, progress: Path, number: int) -> None:
    """Checkpoint two more steps, replay the last of them, and crash where told."""
    store = CheckpointStore(root)
    notes = progress.open("w", buffering=1)
    kill_at(number)
    store.sweep(2)
    for step, generation in ((30, 2), (40, 2), (40, 3)):
        commit_step(store, step, generation)
        notes.write(f"{step}\n")
        store.retire()
    store.sweep(4)
    notes.write("done\n")


def check(root: Path, progress: Path) -> dict[str, Any]:
    """What a resuming head finds, before and after it sweeps; raises when a byte is wrong."""
    store = CheckpointStore(root)
    result: dict[str, Any] = {"told": progress.read_text().split()}
    for when in ("before", "after"):
        found = store.newest_verified()
        assert found is not None
        for state in make_states(found.manifest.step):
            assert_same_state(store.read_layer(found.path, found.manifest, state.layer), state)
        for path in store.checkpoints():
            store.verify(path)  # whole, or not under this name
        result[when] = found.manifest.step
        store.sweep(9)
    result["names"] = sorted(path.name for path in root.iterdir())
    return result


def main(folder: Path) -> None:
    """Kill a child at its first, second, third call, until one ends by itself."""
    torch.set_num_threads(1)
    root, progress, fresh = folder / "checkpoints", folder / "progress", folder / "fresh"
    store = CheckpointStore(fresh)
    for step in (10, 20):
        commit_step(store, step)
    store.begin(30, 1)
    for number in range(1, 2000):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(fresh, root)
        pid = os.fork()
        if pid == 0:
            train(root, progress, number)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        result = {"number": number, "killed": killed, "status": status, **check(root, progress)}
        sys.stdout.write(json.dumps(result) + "\n")
        if not killed:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
