"""Micro-batches read ahead by processes of their own, in the order in which a worker will ask for them.

A micro-batch is a function of step and number, so it does not matter who reads it, nor when; what a fault or
a rollback makes a worker ask for again is read again. Does not read itself (`reader_process` does).
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol

from deepopt.config import JobConfig
from deepopt.datasets.batch_source import BatchSource
from deepopt.datasets.layout import SameShapes
from deepopt.datasets.reader_messages import Answer, Key, ReaderTask
from deepopt.datasets.samples import Batch
from deepopt.errors import InputError, TrainingError

_END_S = 5.0  # for a reader to end when nobody asks any more


class Readable(Protocol):
    """What readers read: the same in their processes."""

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets of a micro-batch."""
        ...


class ReadAhead:
    """The micro-batches of a source, read by processes.

    They start with `expect`; before that, and after `close`, the source is read here.

    Args:
        source: as the readers have it.
        job: `data.prefetch` says how many micro-batches each reader has in work or ready.
        run_dir: as for `build_batch_source`.
        readers: processes.
        of: what the source is of the job.
    """

    def __init__(
        self,
        source: Readable,
        *,
        job: JobConfig,
        run_dir: Path | None,
        readers: int,
        of: Literal["data", "evaluation"],
    ) -> None:
        self._source: Any = source
        self._job = job
        self._run_dir = run_dir
        self._count = readers
        self._of: Literal["data", "evaluation"] = of
        self._ahead = readers * job.data.prefetch
        self._shapes = SameShapes("data" if of == "data" else "evaluation")
        self._tokens = 0
        self._readers: list[_Reader] = []
        self._order: Sequence[int] = ()
        self._uses: Counter[int] = Counter()
        self._repeats = True
        self._place = -1  # of the last micro-batch that was asked for, in the order
        self._step = 0
        self._turn = 0
        # Shared with the thread that receives. ------------------------------------------------
        self._changed = threading.Condition()
        self._asked: dict[Key, _Reader] = {}
        self._found: dict[Key, Answer] = {}
        self._left: Counter[Key] = Counter()  # times that it will still be asked for

    @property
    def fingerprint(self) -> str:
        """Of the source."""
        return str(self._source.fingerprint)

    @property
    def description(self) -> str:
        """Of the source."""
        return str(self._source.description)

    @property
    def vocab_size(self) -> int | None:
        """Of the source."""
        found: int | None = self._source.vocab_size
        return found

    @property
    def tokens_per_microbatch(self) -> int:
        """Of the last micro-batch."""
        return self._tokens or int(self._source.tokens_per_microbatch)

    def state_dict(self) -> None:
        """Nothing: the step says it all."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse, as the source does.

        Raises:
            InputError: always.
        """
        self._source.load_state_dict(state)

    def expect(self, order: Sequence[int], *, step: int, repeats: bool = True) -> None:
        """Begin to read for a worker that will ask for these micro-batches.

        Args:
            order: of micro-batches within a step; one may stand in it several times.
            step: the first one.
            repeats: whether other steps follow.
        """
        self._order, self._uses, self._repeats = tuple(order), Counter(order), repeats
        self._step, self._place = step, -1
        if not self._order:
            return
        if not self._readers:
            self._start()
        with self._changed:
            self._forget_before(step)
            self._request_ahead()

    def batch(self, step: int, microbatch: int) -> Batch:
        """Inputs and targets.

        Args:
            step: from 1.
            microbatch: index within the step.

        Raises:
            DeepoptError: what the source says.
            TrainingError: the dataset's code raised in a reader, or a reader was killed.
        """
        if not self._readers:
            here: Batch = self._source.batch(step, microbatch)
            return here
        key = (step, microbatch)
        with self._changed:
            self._advance(step, microbatch)
            self._request(key)
            self._request_ahead()
            self._changed.wait_for(lambda: key in self._found or self._asked[key].is_gone)
            if key not in self._found:
                raise self._asked[key].death(key)
            answer = self._found[key]
            self._left[key] -= 1
            if self._left[key] <= 0:
                del self._found[key], self._left[key]
        if answer.error is not None:
            raise answer.error
        if answer.batch is None:
            where = f"step {step}, micro-batch {microbatch}"
            if answer.where:
                where = answer.where if where in answer.where else f"{where}, {answer.where}"
            raise TrainingError(
                f"{where}: {answer.raised}",
                remedy="it was raised in a process that reads ahead; without them: num_workers=0, "
                f"{self._of}.readers 0",
            ) from _ReaderError(answer.traceback)
        self._tokens = answer.tokens
        return self._shapes.check(answer.batch, step=step, microbatch=microbatch)

    def close(self) -> None:
        """End the readers."""
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.close()
        with self._changed:
            self._asked.clear()
            self._found.clear()
            self._left.clear()

    # What is asked for, and when. --------------------------------------------------------------

    def _advance(self, step: int, microbatch: int) -> None:
        if step != self._step:
            self._step, self._place = step, -1
            self._forget_before(step)
        following = self._order[self._place + 1 :]
        if microbatch in following[:1]:
            self._place += 1
        elif microbatch in self._order:  # begun anew somewhere
            self._place = self._order.index(microbatch)

    def _request_ahead(self) -> None:
        seen: set[Key] = set()
        for key in self._coming():
            seen.add(key)
            self._request(key)
            if len(seen) >= self._ahead:
                return

    def _coming(self) -> Iterator[Key]:
        for number in self._order[self._place + 1 :]:
            yield self._step, number
        step = self._step
        while self._repeats:
            step += 1
            for number in self._order:
                yield step, number

    def _request(self, key: Key) -> None:
        if key in self._found or key in self._asked:
            return
        reader = self._readers[self._turn % len(self._readers)]
        self._turn += 1
        self._asked[key] = reader
        self._left[key] = max(1, self._uses[key[1]])
        reader.ask(key)

    def _forget_before(self, step: int) -> None:
        for key in [k for k in self._found if k[0] < step]:
            del self._found[key], self._left[key]

    # The processes. -----------------------------------------------------------------------------

    def _start(self) -> None:
        self._turn = 0
        for number in range(self._count):
            task = ReaderTask(job=self._job, run_dir=self._run_dir, number=number, of=self._of)
            self._readers.append(_Reader(task))
        threading.Thread(
            target=self._receive, args=(tuple(self._readers),), daemon=True, name="read-ahead"
        ).start()

    def _receive(self, readers: Sequence[_Reader]) -> None:
        """Take answers until all readers are gone; a thread's."""
        by_connection: dict[Any, _Reader] = {r.connection: r for r in readers}
        try:
            while by_connection:
                for connection in wait(list(by_connection)):
                    try:
                        answer: Answer | None = pickle.loads(
                            by_connection[connection].receive()
                        )
                    except (EOFError, OSError):
                        answer = None
                    with self._changed:
                        if answer is None:
                            by_connection.pop(connection).is_gone = True
                        elif self._asked.pop(answer.key, None) is not None:
                            self._found[answer.key] = answer
                        self._changed.notify_all()
        finally:  # whatever happened, nobody shall wait for ever
            with self._changed:
                for reader in by_connection.values():
                    reader.is_gone = True
                self._changed.notify_all()


class _Reader:
    """One process and the socket to it."""

    def __init__(self, task: ReaderTask) -> None:
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "deepopt.datasets.reader_process", str(there.fileno())]
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._number = task.number
        self._process = subprocess.Popen(
            command,
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        there.close()
        self.connection = Connection(here.detach())
        self.is_gone = False
        self.connection.send_bytes(pickle.dumps(task))

    def ask(self, key: Key) -> None:
        with suppress(OSError):  # who waits for the answer is told that it is gone
            self.connection.send_bytes(pickle.dumps(key))

    def receive(self) -> bytes:
        return self.connection.recv_bytes()

    def death(self, key: Key) -> TrainingError:
        """What to say when it is gone without an answer."""
        self.close()
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return TrainingError(
            f"reader {self._number} (pid {self._process.pid}) ended with {how} before it had read "
            f"step {key[0]}, micro-batch {key[1]}",
            remedy="see the worker's log; signal 9 is often too little memory: fewer readers "
            "(num_workers, data.readers)",
        )

    def close(self) -> None:
        # Both ends learn of it: the process, and the thread that receives.
        with suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _ReaderError(Exception):
    """Carries the traceback of a reader's process into that of the worker."""

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self._traceback = traceback

    def __str__(self) -> str:
        return f"\n{self._traceback}"


def with_readers(source: BatchSource, *, job: JobConfig, run_dir: Path | None) -> BatchSource:
    """A source that is read ahead, where the job wants it.

    Args:
        source: of the job's data.
        job: `data.readers` says by how many processes.
        run_dir: as for `build_batch_source`.

    Raises:
        InputError: it is a stream, which only one can read.
    """
    if not job.data.readers or isinstance(source, ReadAhead):
        return source
    if source.state_dict() is not None:
        raise InputError(
            f"data.readers is {job.data.readers}, and {source.description} is a stream, which only the "
            "worker itself can read in order",
            remedy="set data.readers to 0, or give something with len() and [index]",
        )
    return ReadAhead(source, job=job, run_dir=run_dir, readers=job.data.readers, of="data")
