"""The model's outputs in files of the run directory: written by the workers with the last layers, read by
who asked for them.

A generation writes into a folder of its own: one that starts over leaves what the one before wrote.
`rank-N.structure` is the output with its tensors taken out, `rank-N.part-K.pt` has the tensors of some
micro-batches.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepopt.carried.object_file import to_bytes
from deepopt.checkpoint.durable import write_file
from deepopt.convert.structure import put_together, take_apart
from deepopt.errors import InputError, RunDirectoryError, TrainingError

PART_BYTES = 64 << 20  # of tensors; so much waits in memory


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor in a structure.

    Args:
        index: among the tensors.
    """

    index: int


def samples_of(output: Any, *, size: int) -> tuple[Any, list[torch.Tensor]]:
    """What an output says of each sample, and the structure that it lies in.

    Args:
        output: of a micro-batch: a tensor, or nested tuples, lists, dicts and dataclasses.
        size: samples of the micro-batch.

    Returns:
        The structure, and the tensors whose first dimension is `size`; None stands in the place of any
        other tensor.
    """
    found: list[torch.Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() == 0 or value.shape[0] != size:
            return None
        found.append(value)
        return Slot(len(found) - 1)

    return take_apart(output, leaf), found


def rebuilt(structure: Any, tensors: list[torch.Tensor]) -> Any:
    """An output of a structure.

    Args:
        structure: as `samples_of` gave it.
        tensors: in their order.
    """
    return put_together(structure, lambda x: tensors[x.index] if isinstance(x, Slot) else x)


def make_cut(*, last: int, size: int, left: int, own_loss_counts: bool) -> Any:
    """What leaves the samples that count for the loss, where the last micro-batch was filled up.

    Args:
        last: index of the last micro-batch.
        size: samples of a micro-batch.
        left: of the last one that count.
        own_loss_counts: whether a `loss` in the model's output would be used as it is.
    """

    def cut(microbatch: int, output: Any, targets: torch.Tensor) -> tuple[Any, torch.Tensor]:
        if own_loss_counts and _has_loss(output):  # said at the first one, not at the end
            raise InputError(
                f"the model computes its own loss of whole micro-batches, and the last one has {left} of "
                f"{size} samples",
                remedy="give a batch_size that divides the samples, or a loss of (output, targets): "
                "loss_fn, model.loss",
            )
        if microbatch != last:
            return output, targets
        structure, tensors = samples_of(output, size=size)
        return rebuilt(structure, [tensor[:left] for tensor in tensors]), targets[:left]

    return cut


def _has_loss(output: Any) -> bool:
    if isinstance(output, torch.Tensor | tuple | list):
        return False
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return isinstance(loss, torch.Tensor)


class OutputWriter:
    """Writes the outputs of this worker's micro-batches.

    Args:
        folder: of this generation; made when there is something to write.
        rank: of this worker.
        size: samples of a micro-batch.
        samples: gives the samples of a micro-batch that count.
        part_bytes: of tensors in one file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        size: int,
        samples: Callable[[int], int],
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._size = size
        self._samples = samples
        self._part_bytes = part_bytes
        self._waiting: dict[int, list[torch.Tensor]] = {}
        self._waiting_bytes = 0
        self._numbers = itertools.count()
        self._structure: Any = None

    def take(self, microbatch: int, output: Any) -> None:
        """Keep an output; writes when enough is there.

        Args:
            microbatch: from 0, over all workers.
            output: of the model.

        Raises:
            TrainingError: it says nothing of single samples.
            CheckpointError: it cannot be written.
        """
        structure, tensors = samples_of(output, size=self._size)
        if not tensors:
            raise TrainingError(
                f"the model's output ({type(output).__name__}) holds no tensor whose first dimension is "
                f"the {self._size} sample(s) of a micro-batch",
                remedy="let the model return something of each sample, samples first",
            )
        if self._structure is None:
            self._structure = structure
            self._folder.mkdir(parents=True, exist_ok=True)
            content = to_bytes(structure, what="the model's output")
            write_file(self._folder / f"rank-{self._rank}.structure", pieces=[content])
        left = self._samples(microbatch)
        own = [tensor[:left].detach().to("cpu", copy=True) for tensor in tensors]
        self._waiting[microbatch] = own
        self._waiting_bytes += sum(tensor.nbytes for tensor in own)
        if self._waiting_bytes >= self._part_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self._waiting:
            return
        buffer = io.BytesIO()
        torch.save(self._waiting, buffer)
        path = self._folder / f"rank-{self._rank}.part-{next(self._numbers)}.pt"
        write_file(path, pieces=[buffer.getbuffer()])
        self._waiting, self._waiting_bytes = {}, 0


def generation_folder(root: Path, generation: int) -> Path:
    """Where a generation writes.

    Args:
        root: of the predictions of a run.
        generation: of the workers.
    """
    return root / f"generation-{generation}"


def read_predictions(root: Path, *, num_microbatches: int) -> Any:
    """The outputs of all samples in the order of the data, in the structure of the model's output.

    Args:
        root: of the predictions of a run that has finished; unpickled, so written by one's own job.
        num_microbatches: that there must be.

    Raises:
        RunDirectoryError: some are missing.
    """
    folders = sorted(root.glob("generation-*"), key=lambda path: int(path.name.split("-")[1]))
    parts: dict[int, list[torch.Tensor]] = {}
    structures: list[Path] = []
    if folders:  # the last one finished
        structures = sorted(folders[-1].glob("*.structure"))
        for path in folders[-1].glob("*.pt"):
            parts.update(torch.load(path, weights_only=True))
    missing = [number for number in range(num_microbatches) if number not in parts]
    if missing or not structures:
        raise RunDirectoryError(
            f"{root} lacks the outputs of {len(missing)} of {num_microbatches} micro-batches",
            remedy="runs/ must lie where all hosts and this process see it",
        )
    structure = pickle.loads(structures[0].read_bytes())
    rows = [parts[number] for number in range(num_microbatches)]
    try:
        joined = [torch.cat(column) for column in zip(*rows, strict=True)]
    except (ValueError, RuntimeError) as error:
        raise TrainingError(
            f"the model's outputs differ between micro-batches: {error}",
            remedy="let it return tensors of the same shapes for each, but for the samples",
        ) from error
    return rebuilt(structure, joined)
