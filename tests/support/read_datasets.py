"""Datasets whose samples tell which process read them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

BROKEN = 13


class Marked:
    """Samples (index, process id); one of them cannot be read, another never ends.

    Args:
        folder: gets a file of the process id when sample `hangs` is asked for.
        hangs: index of a sample that never comes; None: none.
        exits: index of a sample that ends its process.
    """

    def __init__(
        self, folder: str = "", hangs: int | None = None, exits: int | None = None
    ) -> None:
        self._folder, self._hangs, self._exits = folder, hangs, exits

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if index == BROKEN:
            raise ValueError("broken")
        if index == self._exits:
            os._exit(3)
        if index == self._hangs:
            Path(self._folder, str(os.getpid())).touch()
            time.sleep(600)
        return torch.tensor([float(index)]), torch.tensor([float(os.getpid())])


class Bytes:
    """Micro-batches of random bytes for a language model, and a file that says who read them.

    Args:
        folder: gets a file `reader` or `worker` for each process.
        size: samples of a micro-batch.
        length: of a sequence.
    """

    num_microbatches = 3  # of a validation set

    def __init__(self, folder: str, size: int, length: int) -> None:
        self._folder, self._size, self._length = folder, size, length

    def batch(self, step: int, microbatch: int) -> Any:
        spec = sys.modules["__main__"].__spec__
        is_reader = spec is not None and spec.name == "deepopt.datasets.reader_process"
        Path(self._folder, "reader" if is_reader else "worker").touch()
        generator = torch.Generator().manual_seed(100 * step + microbatch)
        shape = (self._size, self._length + 1)
        ids = torch.randint(256, shape, generator=generator, dtype=torch.int64)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
