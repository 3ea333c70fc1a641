"""Datasets of users, each a factory's target for `data.dataset`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Tokens:
    """By index: sample i is i, i + 1, ..."""

    vocab_size = 1000

    def __init__(self, size: int, *, length: int = 5) -> None:
        self.size = size
        self.length = length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[int]:
        return list(range(index, index + self.length))


class Pairs:
    """By index: (features, class)."""

    description = "points with a class"
    fingerprint = "points-1"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(index)), index % 2


class Ragged(Pairs):
    """By index: samples of different lengths."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(index + 1), 0


class Counter:
    """A stream: 0, 1, 2, ... each a sample of the same number; saves what comes next."""

    def __init__(self, end: int | None = None, *, length: int = 5, state: Any = None) -> None:
        self.end = end
        self.length = length
        self.state = state
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.next == self.end:
            raise StopIteration
        self.next += 1
        return torch.full((self.length,), self.next - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class Loader:
    """A stream whose state is the loader's, while its iterators are plain generators."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            self.next += 1
            yield [self.next - 1] * 5

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Batches:
    """Has `batch(step, microbatch)` itself."""

    tokens_per_microbatch = 7

    def __init__(self, *, good: bool = True) -> None:
        self.good = good

    def batch(self, step: int, microbatch: int) -> Any:
        inputs = torch.tensor([step, microbatch])
        return (inputs, -inputs) if self.good else inputs


def plain_generator() -> Iterator[list[int]]:
    yield [0] * 5


def broken(**kwargs: object) -> None:
    raise KeyError("corpus")


def number() -> int:
    return 3


def vanishing() -> Tokens:
    """A source that the worker whose output goes to the log of rank 1 does not survive."""
    if Path("/proc/self/fd/1").readlink().name == "rank-1.log":
        os._exit(9)
    return Tokens(64, length=17)
