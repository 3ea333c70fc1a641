"""What a worker and a process that reads for it tell each other.

Apart from that process's module, which has another name in the process itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepopt.config import JobConfig
from deepopt.datasets.samples import Batch
from deepopt.errors import DeepoptError

Key = tuple[int, int]  # (step, micro-batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderTask:
    """What a reader reads.

    Args:
        job: whose data.
        run_dir: as for `build_batch_source`.
        number: of the reader, from 0.
        of: the training data, or the validation set.
    """

    job: JobConfig
    run_dir: Path | None
    number: int
    of: Literal["data", "evaluation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A micro-batch, or why there is none.

    Args:
        key: that was asked for.
        batch: None where reading it failed.
        tokens: of the micro-batch, as the source counts them.
        error: that the source raised on purpose.
        raised: another exception of the data's code, in one line.
        where: what was being read, as far as the source told.
        traceback: text of that exception.
    """

    key: Key
    batch: Batch | None = None
    tokens: int = 0
    error: DeepoptError | None = None
    raised: str = ""
    where: str = ""
    traceback: str = ""
