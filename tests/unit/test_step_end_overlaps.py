"""What the end of a step does while messages are under way, and that it can be taken back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from deepopt.errors import TrainingError
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.reduction import Bucket, Reducer
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import Channel, Pending, PendingReceive, TensorSpec
from support.lone_step import Cut, job_of, make_step


class Peers(LoneTransport):
    """Rank 0 of some ranks; the others send ones. Keeps what happens in order."""

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        self.happened.append(f"post {message}")
        return _Message(f"take {message}", self.happened, specs)

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        self.happened.append(f"send {message}")
        return _Message(f"sent {message}", self.happened, ())


class _Message:
    def __init__(self, event: str, happened: list[str], specs: Sequence[TensorSpec]) -> None:
        self.event, self.happened, self.specs = event, happened, specs

    def wait(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        self.happened.append(self.event)
        return tuple(torch.ones(spec.shape, dtype=spec.dtype) for spec in self.specs)


def bucket(index: int, *, holders: int) -> Bucket:
    term = torch.full((6,), 2.0)
    return Bucket(
        index=index,
        owners=(tuple(range(holders)),),
        numel=6,
        terms={(0, 0): term},
        results=(term,),
    )


def test_a_bucket_is_whole_before_later_ones_have_come() -> None:
    happened: list[str] = []
    reducer = Reducer(Peers(happened))
    buckets = [bucket(index, holders=2) for index in (1, 0)]
    for one in buckets:
        reducer.start(one)
    reducer.finish(lambda one: happened.append(f"whole {one.index}"))
    begun = ["post 2", "send 2", "post 0", "send 0"]
    assert happened == [*begun, "take 2", "sent 2", "whole 1", "take 0", "sent 0", "whole 0"]
    assert all(one.results[0].tolist() == [3.0] * 6 for one in buckets)


def test_parts_of_more_holders_are_out_before_a_bucket_is_whole() -> None:
    """Whoever is told may scale the totals, and a part of them travels to the others."""
    happened: list[str] = []
    reducer = Reducer(Peers(happened))
    parted, paired = bucket(2, holders=3), bucket(1, holders=2)
    reducer.start(parted)
    reducer.start(paired)
    reducer.finish(lambda one: happened.append(f"whole {one.index}"))
    assert happened.index("whole 1") < happened.index("take 5")
    assert happened[-5:] == ["take 5", "take 5", "sent 5", "sent 5", "whole 2"]
    assert parted.results[0].tolist() == [4.0, 4.0, 1.0, 1.0, 1.0, 1.0]  # others' parts: ones


class Watching(Cut):
    """Looks at the routers while the rows of all ranks are on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.step: PipelineStep | None = None
        self.seen: list[list[torch.Tensor]] = []

    def wait(self) -> list[list[float]]:
        assert self.step is not None
        self.seen.append(biases(self.step))
        return super().wait()


def biases(step: PipelineStep) -> list[torch.Tensor]:
    return [
        buffer.clone()
        for optimizer in step.optimizers.values()
        for buffer in optimizer.layer.buffers.values()
    ]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    assert len(one) == len(other) > 0
    return all(map(torch.equal, one, other))


def watched(**sections: object) -> tuple[PipelineStep, Watching]:
    transport = Watching()
    step = make_step(job_of(overlap=False, **sections), transport)
    transport.step = step
    return step, transport


def test_routers_are_updated_while_the_norms_travel() -> None:
    step, transport = watched()
    before = biases(step)
    step.run(1)
    assert not same(transport.seen[0], before)
    assert same(transport.seen[0], biases(step))


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_bad_step_leaves_the_routers_as_they_were(policy: str) -> None:
    """Their counts are good: only what follows the last of them is spoilt."""
    step, transport = watched(faults={"bad_step": policy})
    step.run(1)
    before = biases(step)
    last = list(step.optimizers.values())[-1].layer.module
    last.register_forward_hook(lambda *called: called[-1] * float("nan"))
    if policy == "fail":
        with pytest.raises(TrainingError):
            step.run(2)
    else:
        assert step.run(2).skipped
    assert not same(transport.seen[-1], before)
    assert same(biases(step), before)
