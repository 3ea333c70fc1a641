"""Models that nobody here wrote train as they are: the bits of one worker, and of a plain PyTorch loop.

Eight architectures with random weights, 20 steps each, by `DeepTrainer`, as a script would:

- *bi-stream*, with dropout: four workers in mirror placement against one worker, at the same two groups
  of micro-batches. All losses and trained weights must be equal bit for bit.
- *line*, without dropout: four workers in a line at one group, against a plain PyTorch loop that
  accumulates the same micro-batches. Bit for bit where no weights are tied. Tied weights add their uses in
  another order than autograd does: the losses must be within 1e-4, and the model runs once more untied.

The ratio is the share of models of which all that is true. Other figures are the largest difference of a
loss. Run directories stay only with --keep.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _architectures import Make, Size, architectures
from _machine import describe
from _report import progress, ratio_line, say, table
from torch.utils.data import Dataset

from deepopt.trainer import DeepTrainer

AIM = 1.0
TOLERANCE = 1e-4
DROPOUT = 0.1
MICROBATCHES, MICROBATCH_SIZE = 8, 2
WORKERS = 4
SEED = 3
MODELS = (
    "Llama",
    "Mixtral",
    "Qwen3-MoE",
    "GPT-2 (tied)",
    "T5",
    "BERT (padded)",
    "ViT",
    "nn.Transformer",
)
TIED = ("GPT-2 (tied)", "T5", "BERT (padded)")

State = dict[str, torch.Tensor]


class Rows(Dataset[Any]):
    """Samples of a batch that is large enough for all steps."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._columns = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> Any:
        row = {name: column[index] for name, column in self._columns.items()}
        return row if "labels" in row else (row, row["tgt"].flip(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to.

    Args:
        losses: of each step.
        state: the weights at its end.
    """

    losses: tuple[float, ...]
    state: State

    def equals(self, other: Trained) -> bool:
        """Whether all losses and all weights have the same bits."""
        return self.losses == other.losses and all(
            torch.equal(value, other.state[name]) for name, value in self.state.items()
        )

    def distance(self, other: Trained) -> float:
        """The largest difference of a loss."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))


def main() -> None:
    """Train all of them and print the table and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two models for three steps")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each training")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", default=MODELS)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="new folder for the run directories"
    )
    options = parser.parse_args()
    if options.quick:
        options.steps, options.models = 3, ("Llama", "T5")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as the workers
    say("\n".join(describe()))
    say(
        f"{options.steps} steps of {MICROBATCHES} micro-batches of {MICROBATCH_SIZE} samples, width 64, "
        f"4 blocks, AdamW, {WORKERS} workers\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        rows = [compare(name, steps=options.steps, folder=folder) for name in options.models]
    header = (
        "model",
        "parameters",
        "loss, first",
        "last",
        "bi-stream",
        "line",
        "untied",
        "job s",
    )
    say(table(header, [row.cells for row in rows]) + "\n")
    share = sum(row.holds for row in rows) / len(rows)
    say(f"as claimed: {sum(row.holds for row in rows)} of {len(rows)}")
    say(ratio_line(share, aim=AIM))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table.

    Args:
        cells: of it.
        holds: whether all that is claimed of this model is true.
    """

    cells: tuple[str, ...]
    holds: bool


def compare(name: str, *, steps: int, folder: Path) -> Row:
    """Train one model in all ways.

    Args:
        name: of the architecture.
        steps: of each training.
        folder: of the run directories.
    """
    size = Size(width=64, depth=4, length=16, samples=steps * MICROBATCHES * MICROBATCH_SIZE)
    progress(f"{name}: bi-stream")
    make = architectures(size, dropout=DROPOUT)[name]
    began_s = time.perf_counter()
    stream = fit(
        make, folder / f"{name}-bi-stream", placement="bi_stream", workers=WORKERS, groups=2
    )
    job_s = time.perf_counter() - began_s
    alone = fit(make, folder / f"{name}-alone", placement="line", workers=1, groups=2)
    as_alone = stream.equals(alone)

    progress(f"{name}: line")
    make = architectures(size)[name]
    line = fit(make, folder / f"{name}-line", placement="line", workers=WORKERS, groups=1)
    plain = plain_loop(make)
    tied, untied = name in TIED, "-"
    holds = line.distance(plain) <= TOLERANCE if tied else line.equals(plain)
    if tied:
        progress(f"{name}: line, untied")
        make = architectures(size, tied=False)[name]
        line_untied = fit(
            make, folder / f"{name}-untied", placement="line", workers=WORKERS, groups=1
        )
        plain_untied = plain_loop(make)
        untied = _verdict(line_untied, plain_untied)
        holds = holds and line_untied.equals(plain_untied)
    cells = (
        name,
        f"{sum(value.numel() for value in stream.state.values()):,}",
        f"{stream.losses[0]:.4f}",
        f"{stream.losses[-1]:.4f}",
        _verdict(stream, alone),
        _verdict(line, plain),
        untied,
        f"{job_s:.0f}",
    )
    return Row(cells=cells, holds=as_alone and holds)


def fit(make: Make, run_dir: Path, *, placement: str, workers: int, groups: int) -> Trained:
    """Train a model with `DeepTrainer`.

    Args:
        make: gives the model and its data.
        run_dir: new.
        placement: of the stages.
        workers: how many.
        groups: of micro-batches.
    """
    model, data = made(make)
    trainer = DeepTrainer(
        model,
        placement=placement,
        workers=workers,
        groups=groups,
        loss_fn=None if "labels" in data else mean_square,
        optimizer=torch.optim.AdamW,
        optimizer_kwargs={"lr": 1e-3},
        batch_size=MICROBATCHES * MICROBATCH_SIZE,
        microbatches=MICROBATCHES,
        shuffle=False,
        seed=SEED,
        run_dir=run_dir,
        progress=False,
        settings={"pipeline": {"boundaries": None}, "worker": {"device": "cpu"}},
    )
    result = trainer.fit(Rows(data), epochs=1)
    return Trained(losses=result.losses, state=_state(model))


def plain_loop(make: Make) -> Trained:
    """Train a model as PyTorch's documentation does, with accumulated micro-batches.

    Args:
        make: gives the model and its data.
    """
    model, data = made(make)
    without_cache(model)
    rows = Rows(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    batches = iter(torch.utils.data.DataLoader(rows, batch_size=MICROBATCH_SIZE))
    for _ in range(len(rows) // (MICROBATCHES * MICROBATCH_SIZE)):
        optimizer.zero_grad()
        found = []
        for _ in range(MICROBATCHES):
            batch = next(batches)
            loss = (
                model(**batch).loss
                if "labels" in data
                else mean_square(model(**batch[0]), batch[1])
            )
            (loss / MICROBATCHES).backward()
            found.append(loss.item())
        optimizer.step()
        losses.append(math.fsum(found) / MICROBATCHES)
    return Trained(losses=tuple(losses), state=_state(model))


def without_cache(model: torch.nn.Module) -> None:
    """Compute without a KV cache, as a pipeline does: keys and values that went through one lie otherwise
    in memory, and T5's gradients get other bits.

    Args:
        model: changed in place.
    """
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False


def made(make: Make) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model with its first weights, in train mode, and its data; the same each time.

    Args:
        make: gives both.
    """
    torch.manual_seed(SEED)
    model, data = make()
    return model.train(), data


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of a model that has none of its own."""
    return (output - targets).square().mean()


def _state(model: torch.nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _verdict(ours: Trained, theirs: Trained) -> str:
    return "bit-equal" if ours.equals(theirs) else f"{ours.distance(theirs):.1e}"


if __name__ == "__main__":
    main()
