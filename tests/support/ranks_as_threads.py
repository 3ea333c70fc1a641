"""All ranks of a plan in this process: threads that take turns and hand each other tensors.

No process is started and nothing is sent over sockets: a plan of four ranks runs in a second. One thread
runs at a time, from one wait to the next, so that generators and their seeds are nobody else's meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import StepResult
from deepopt.pipeline.transport import (
    Channel,
    Pending,
    PendingGather,
    PendingReceive,
    TensorSpec,
)
from deepopt.planner.plan import Plan

_LONGEST_WAIT_S = 20.0


class Meeting:
    """What the ranks of one group share. Who runs holds `turn`; who waits gives it away."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.given: dict[object, Any] = {}

    def give(self, key: object, value: Any) -> None:
        self.given[key] = value
        self.turn.notify_all()

    def take(self, keys: Sequence[object]) -> list[Any]:
        if not self.turn.wait_for(
            lambda: all(key in self.given for key in keys), _LONGEST_WAIT_S
        ):
            raise TimeoutError(f"nobody gave {[k for k in keys if k not in self.given]}")
        return [self.given[key] for key in keys]


class ThreadTransport(LoneTransport):
    """One rank's way to the others."""

    def __init__(self, meeting: Meeting, *, rank: int, world_size: int) -> None:
        self._meeting, self._rank, self._size = meeting, rank, world_size
        self._num_gathers = 0
        self._sent: dict[tuple[Channel, int], int] = {}
        self._asked: dict[tuple[Channel, int], int] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._size

    def open(self, channels: Iterable[Channel]) -> None:
        pass

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        count = self._sent[channel, message] = self._sent.get((channel, message), 0) + 1
        copies = tuple(tensor.detach().clone() for tensor in tensors)
        self._meeting.give((channel, message, count), copies)

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        self.send(channel, message, tensors)
        return _Later(lambda: None)

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        count = self._asked[channel, message] = self._asked.get((channel, message), 0) + 1
        key = (channel, message, count)
        return _Later(lambda: tuple(t.clone() for t in self._meeting.take([key])[0]))

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        self._num_gathers += 1
        number = self._num_gathers
        self._meeting.give(("rows", number, self._rank), list(values))
        keys = [("rows", number, rank) for rank in range(self._size)]
        return _Later(lambda: [list(row) for row in self._meeting.take(keys)])

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        self._meeting.give(key, tuple(specs))

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        found: tuple[TensorSpec, ...] = self._meeting.take([key])[0]
        return found


class _Later:
    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait


def train_in_threads(
    job: JobConfig, plan: Plan, *, num_steps: int, overlap: bool = False
) -> Mapping[int, list[StepResult]]:
    """Train some steps of a plan, one thread a rank; the results by rank."""
    meeting, size = Meeting(), plan.pipeline_size * plan.data_size
    results: dict[int, list[StepResult]] = {rank: [] for rank in range(size)}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        with meeting.turn:
            try:
                transport = ThreadTransport(meeting, rank=rank, world_size=size)
                step = _make_step(job, plan, rank=rank, transport=transport)
                for number in range(1, num_steps + 1):
                    go_on = overlap and number < num_steps
                    results[rank].append(step.run(number, go_on=go_on))
            except BaseException as error:  # noqa: BLE001 - raised by whoever called
                errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def _make_step(
    job: JobConfig, plan: Plan, *, rank: int, transport: LoneTransport
) -> PipelineStep:
    device = torch.device("cpu")
    held = [i for stage in plan.held_stages(rank) for i in plan.stage_layers(stage)]
    layers, loss = build_layers(job, held, device=device)
    return PipelineStep(
        job=job,
        plan=plan,
        skeleton=describe(job),
        rank=rank,
        layers=dict(zip(held, layers, strict=True)),
        loss=loss,
        transport=transport,
        batches=build_batch_source(job, run_dir=None),
        device=device,
    )
