"""Batches from a stream: consumed in the order of (step, micro-batch), whatever order they are
asked in.

Every worker that needs batches has a stream of its own and reads all of it, so what one of them
trains on is left out by another. Streams cannot go back: that takes `load_state_dict`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from deepopt.datasets.samples import Batch, stack, to_pair
from deepopt.errors import InputError

_STEPS_KEPT = 2  # the first stage may be a step ahead of the last


class StreamSource:
    """Micro-batches of an iterable that can save and load its position.

    Args:
        dataset: its iterator gives one sample after the other (see `samples.to_pair`). It, or
            else its iterator, has `state_dict()`, JSON-ready, and `load_state_dict(state)`.
        microbatches: of one step, over all replicas.
        microbatch_size: samples of one.
        sequence_length: in tokens.
        name: of the dataset, for errors.
        fingerprint: tells one dataset from another.
        description: for people.
        vocab_size: None when unknown.

    Raises:
        InputError: the stream cannot save its position, or not as JSON.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        microbatches: int,
        microbatch_size: int,
        sequence_length: int,
        name: str,
        fingerprint: str,
        description: str,
        vocab_size: int | None,
    ) -> None:
        self.fingerprint = fingerprint
        self.description = description
        self.vocab_size = vocab_size
        self.tokens_per_microbatch = microbatch_size * sequence_length
        self._name = name
        self._dataset = dataset
        self._microbatches = microbatches
        self._microbatch_size = microbatch_size
        self._sequence_length = sequence_length
        self._iterator: Iterator[Any] = iter(dataset)
        self._next = (1, 0)
        self._asked_step = 0
        self._kept: dict[tuple[int, int], Batch] = {}
        keeper = next((k for k in (dataset, self._iterator) if keeps_state(k)), None)
        if keeper is None:
            raise InputError(
                f"{name} gives a stream ({type(dataset).__name__}) without state_dict() and "
                "load_state_dict(), so a run could not resume where it stopped",
                remedy="add both to it, or return a dataset with len() and [index]",
            )
        self._keeper: Any = keeper
        self.state_dict()  # refuse early what cannot be written

    def batch(self, step: int, microbatch: int) -> Batch:
        """One micro-batch; may be asked for again within the step and the one after.

        Args:
            step: from 1.
            microbatch: index within the step, over all replicas.

        Raises:
            InputError: the stream ended.
        """
        wanted = (step, microbatch)
        self._asked_step = max(self._asked_step, step)
        while self._next <= wanted:
            self._pull(keep=self._next[0] > step - _STEPS_KEPT)
        assert wanted in self._kept, (
            f"step {step}, micro-batch {microbatch} was asked for after the stream had left it"
        )
        return self._kept[wanted]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step of which a batch was asked for, as JSON-ready
        data."""
        while self._next <= (self._asked_step, self._microbatches - 1):
            self._pull(keep=True)
        state = {"step": self._next[0] - 1, "stream": self._keeper.state_dict()}
        try:
            copied: dict[str, Any] = json.loads(json.dumps(state))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self._name}: its state_dict() cannot be written as JSON: {error}",
                remedy="return numbers, strings, lists and dicts with string keys",
            ) from error
        return copied

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state_dict` was called.

        Args:
            state: what it gave.
        """
        self._keeper.load_state_dict(copy.deepcopy(state["stream"]))
        if self._keeper is self._dataset:
            self._iterator = iter(self._dataset)
        self._next = (state["step"] + 1, 0)
        self._asked_step = state["step"]
        self._kept.clear()

    def _pull(self, *, keep: bool) -> None:
        step, microbatch = self._next
        pairs = []
        for _ in range(self._microbatch_size):
            where = f"{self._name}: a sample of step {step}, micro-batch {microbatch}"
            try:
                sample = next(self._iterator)
            except StopIteration as end:
                raise InputError(
                    f"{self._name}: the stream ended in step {step}, micro-batch {microbatch}",
                    remedy="let it start again at its end, or lower training.steps",
                ) from end
            pairs.append(to_pair(sample, sequence_length=self._sequence_length, where=where))
        if keep:
            where = f"{self._name}: step {step}, micro-batch {microbatch}"
            self._kept[self._next] = stack(pairs, where=where)
        last = microbatch + 1 == self._microbatches
        self._next = (step + 1, 0) if last else (step, microbatch + 1)
        for key in [k for k in self._kept if k[0] <= step - _STEPS_KEPT]:
            del self._kept[key]


def keeps_state(candidate: Any) -> bool:
    """Whether it can say where it stands and be put there again."""
    return all(callable(getattr(candidate, m, None)) for m in ("state_dict", "load_state_dict"))
