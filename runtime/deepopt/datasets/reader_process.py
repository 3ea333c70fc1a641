"""A process that reads micro-batches for a worker: `python -m deepopt.datasets.reader_process FD`.

It builds the same source as the worker, answers one request after the other, and ends with the worker,
whichever way that ends: the kernel closes the socket between them, even while a sample is being read.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch

from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.evaluation import evaluation_batches
from deepopt.datasets.reader_messages import Answer, Key, ReaderTask
from deepopt.errors import DeepoptError


def main(descriptor: int) -> None:
    """Read until the worker is gone.

    Args:
        descriptor: of a socket to it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the worker decides when it is over
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_worker, args=(descriptor,), daemon=True).start()
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    task: ReaderTask = pickle.loads(connection.recv_bytes())
    reader = _Reader(task)
    while True:
        try:
            answer = reader.answer(pickle.loads(connection.recv_bytes()))
            connection.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
        except (EOFError, OSError):
            return


class _Reader:
    def __init__(self, task: ReaderTask) -> None:
        self._task = task
        self._source: Any = None

    def answer(self, key: Key) -> Answer:
        """A micro-batch, or why there is none."""
        try:
            if self._source is None:
                self._source = self._open()
            batch = self._source.batch(*key)
        except DeepoptError as error:
            return Answer(key=key, error=error)
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return Answer(
                key=key,
                raised=f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})",
                where="; ".join(getattr(error, "__notes__", ())),
                traceback="".join(traceback.format_exception(error)),
            )
        tokens = getattr(self._source, "tokens_per_microbatch", 0)
        return Answer(key=key, batch=batch, tokens=tokens)

    def _open(self) -> Any:
        job, run_dir = self._task.job, self._task.run_dir
        if self._task.of == "data":
            found: Any = build_batch_source(job, run_dir=run_dir)
            source = found
        else:
            found = evaluation_batches(job, run_dir=run_dir)
            source = found.source
        begin = getattr(source, "begin_reader", None)
        if callable(begin):
            begin(self._task.number)
        return found


def _end_with_worker(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
