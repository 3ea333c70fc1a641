"""Which micro-batches readers are asked for, and when; the readers are made up."""

from __future__ import annotations

import pickle
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.datasets import read_ahead
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.datasets.read_ahead import ReadAhead, with_readers
from deepopt.datasets.reader_messages import Answer, ReaderTask
from deepopt.datasets.samples import Batch
from deepopt.errors import InputError
from deepopt.pipeline.lone_transport import LoneTransport
from support.lone_step import job_of, make_step

JOB = JobConfig.model_validate({"data": {"prefetch": 2, "readers": 2}})


def batch_of(step: int, microbatch: int) -> Batch:
    return torch.tensor([step]), torch.tensor([microbatch])


class Source:
    description = "numbers"
    tokens_per_microbatch = 7

    def __init__(self, state: Any = None) -> None:
        self._state = state

    def batch(self, step: int, microbatch: int) -> Batch:
        return batch_of(step, microbatch)

    def state_dict(self) -> Any:
        return self._state


class Desk:
    """Answers at once, and remembers what it was asked."""

    asked: list[tuple[int, int]]

    def __init__(self, task: ReaderTask) -> None:
        self.connection, self._other = Pipe()
        self.is_gone = False

    def ask(self, key: tuple[int, int]) -> None:
        Desk.asked.append(key)
        self._other.send_bytes(pickle.dumps(Answer(key=key, batch=batch_of(*key), tokens=5)))

    def receive(self) -> bytes:
        return self.connection.recv_bytes()

    def close(self) -> None:
        self._other.close()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> ReadAhead:
    monkeypatch.setattr(read_ahead, "_Reader", Desk)
    Desk.asked = []
    return ReadAhead(Source(), job=JOB, run_dir=None, readers=2, of="data")  # four ahead


def test_readers_are_ahead_by_what_they_may_have_ready_across_steps(ahead: ReadAhead) -> None:
    ahead.expect([0, 3, 1], step=5)
    assert Desk.asked == [(5, 0), (5, 3), (5, 1), (6, 0)]
    assert torch.equal(ahead.batch(5, 0)[1], torch.tensor([0]))
    assert Desk.asked[4:] == [(6, 3)]
    assert ahead.tokens_per_microbatch == 5
    ahead.batch(5, 3)
    ahead.batch(5, 1)
    ahead.batch(6, 0)
    assert Desk.asked[5:] == [(6, 1), (7, 0), (7, 3)]
    ahead.close()


def test_what_is_asked_for_twice_in_a_step_is_read_once(ahead: ReadAhead) -> None:
    ahead.expect([0, 1, 1, 0], step=1, repeats=False)
    for microbatch in (0, 1, 1, 0):
        ahead.batch(1, microbatch)
    assert Desk.asked == [(1, 0), (1, 1)]
    ahead.close()


def test_after_a_fault_an_earlier_step_is_read_again(ahead: ReadAhead) -> None:
    ahead.expect([0, 1], step=1)
    for key in ((1, 0), (1, 1), (2, 0)):
        ahead.batch(*key)
    before = len(Desk.asked)
    ahead.expect([0, 1], step=1)
    assert Desk.asked[before:] == [(1, 0), (1, 1), (2, 0)]  # (2, 1) is ready still
    assert torch.equal(ahead.batch(1, 1)[1], torch.tensor([1]))
    ahead.close()


def test_without_readers_at_work_the_source_is_read_here(ahead: ReadAhead) -> None:
    assert torch.equal(ahead.batch(3, 2)[0], torch.tensor([3]))
    assert ahead.tokens_per_microbatch == 7
    assert not Desk.asked


def test_a_stream_is_not_read_ahead() -> None:
    stream: Any = Source(state={"step": 0})
    with pytest.raises(InputError, match=r"data\.readers is 2, and numbers is a stream"):
        with_readers(stream, job=JOB, run_dir=None)


def test_an_executor_says_what_it_will_read_in_which_order() -> None:
    class Watched:
        def __init__(self, source: BatchSource) -> None:
            self._source = source
            self.asked: list[int] = []

        def batch(self, step: int, microbatch: int) -> Batch:
            self.asked.append(microbatch)
            return self._source.batch(step, microbatch)

    job = job_of(overlap=False)
    batches = Watched(build_batch_source(job, run_dir=None))
    step = make_step(job, LoneTransport(), batches=batches)
    step.run(1)
    assert step.executor.microbatches_read() == batches.asked == [0, 1]
