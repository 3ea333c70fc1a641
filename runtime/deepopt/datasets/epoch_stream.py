"""Steps of a script's stream: read in order by every worker that needs batches, begun anew at its end."""

from __future__ import annotations

import base64
import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from deepopt.datasets.layout import Layout, SameShapes, num_tokens, split, to_batch
from deepopt.datasets.samples import Batch
from deepopt.datasets.seeded import seeded
from deepopt.datasets.stream import keeps_state
from deepopt.errors import InputError

_STEPS_KEPT = 2  # the first stage may be a step ahead of the last
_UNFIT = "cannot resume: it has no state_dict() and load_state_dict()"


class EpochStream:
    """Micro-batches of an iterable.

    What the iterable draws at random comes from generators of its own, seeded by epoch, so that all
    workers read the same.

    Args:
        dataset: gives samples, or batches of a step where `collate` is None. It, or else its
            iterator, may have `state_dict()` and `load_state_dict(state)`: then the run can resume.
        layout: sizes of a step.
        drop_last: leave out samples at the end that are less than a step.
        collate: makes a batch of a list of samples; None where elements are batches.
        name: of the dataset, for errors.
        fingerprint: tells one dataset from another.
        description: for people.
    """

    vocab_size = None

    def __init__(
        self,
        dataset: Any,
        *,
        layout: Layout,
        drop_last: bool,
        collate: Callable[[list[Any]], Any] | None,
        name: str,
        fingerprint: str,
        description: str,
    ) -> None:
        self.fingerprint = fingerprint
        self.description = description
        self.tokens_per_microbatch = layout.microbatch_size
        self._dataset = dataset
        self._layout = layout
        self._drop_last = drop_last
        self._collate = collate
        self._name = name
        self._shapes = SameShapes(name)
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        self._step = 0  # the last one that was read
        self._drawn = 0  # elements of the epoch
        self._kept: dict[int, list[Batch]] = {}
        self._asked = 0

    def batch(self, step: int, microbatch: int) -> Batch:
        """One micro-batch; may be asked for again within the step and the one after.

        Args:
            step: from 1.
            microbatch: index within the step.

        Raises:
            InputError: the stream gave something that is no batch, or nothing.
        """
        self._asked = max(self._asked, step)
        while self._step < step:
            self._pull()
        assert step in self._kept, f"step {step} was asked for after the stream had left it"
        batch = self._kept[step][microbatch]
        self.tokens_per_microbatch = num_tokens(batch)
        return self._shapes.check(batch, step=step, microbatch=microbatch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that was asked for, as JSON-ready data."""
        while self._step < self._asked:
            self._pull()
        keeper = self._keeper()
        state = None if keeper is None else _to_json(keeper.state_dict(), name=self._name)
        return {"step": self._step, "epoch": self._epoch, "drawn": self._drawn, "stream": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state_dict` was called.

        Args:
            state: what it gave.

        Raises:
            InputError: the stream keeps no position.
        """
        self._epoch = state["epoch"]
        keeper = self._keeper()
        if keeper is None or state["stream"] is None:
            raise InputError(
                f"{self._name} {_UNFIT}, so step {state['step']} cannot be gone on from",
                remedy="add both to it, give a dataset with len() and [index], or start a new run",
            )
        keeper.load_state_dict(_from_json(state["stream"]))
        if keeper is self._dataset:
            self._iterator = None
        self._step = self._asked = state["step"]
        self._drawn = state["drawn"]
        self._kept.clear()

    @property
    def can_resume(self) -> bool:
        """Whether it can say where it is, and go back there."""
        return self._keeper() is not None

    def _keeper(self) -> Any:
        """The dataset or its iterator, whichever keeps the position."""
        if keeps_state(self._dataset):
            return self._dataset
        iterator = self._begin_if_needed()
        return iterator if keeps_state(iterator) else None

    def _begin_if_needed(self) -> Iterator[Any]:
        if self._iterator is None:
            if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
                set_epoch(self._epoch)
            with seeded(self._layout.seed, "stream", self._epoch):
                self._iterator = iter(self._dataset)
        return self._iterator

    def _pull(self) -> None:
        """Read one step."""
        step, layout = self._step + 1, self._layout
        where = f"{self._name}: step {step}"
        if self._collate is None:
            (whole,) = self._elements(1, step=step)
            parts = split(
                to_batch(whole, layout=layout, where=where), layout=layout, where=where
            )
        else:
            samples = self._elements(layout.batch_size, step=step)
            size = layout.microbatch_size
            parts = []
            for microbatch in range(layout.microbatches):
                with seeded(layout.seed, step, microbatch):
                    collated = self._collate(
                        samples[microbatch * size : (microbatch + 1) * size]
                    )
                place = f"{where}, micro-batch {microbatch}"
                parts.append(to_batch(collated, layout=layout, where=place))
        self._step = step
        self._kept[step] = parts
        for known in [s for s in self._kept if s <= step - _STEPS_KEPT]:
            del self._kept[known]

    def _elements(self, count: int, *, step: int) -> list[Any]:
        """The next ones; from the beginning again where the stream ends."""
        found: list[Any] = []
        while len(found) < count:
            iterator = self._begin_if_needed()
            with seeded(self._layout.seed, "stream", self._epoch, self._drawn):
                element = next(iterator, _END)
            if element is not _END:
                found.append(element)
                self._drawn += 1
                continue
            if self._drawn == 0:
                raise InputError(
                    f"{self._name} gave nothing in epoch {self._epoch + 1}",
                    remedy="it is empty, or can be read only once: give an object whose __iter__ "
                    "begins anew",
                )
            if found and not self._drop_last:
                raise InputError(
                    f"{self._name} ended in step {step}: {len(found)} of {count} samples are left",
                    remedy="set drop_last=True to leave them out, or choose a batch size that "
                    "divides the number of samples",
                )
            found.clear()
            self._iterator = None
            self._epoch += 1
            self._drawn = 0
        return found


_END = object()


def _to_json(state: Any, *, name: str) -> dict[str, Any]:
    """A state as JSON, or pickled where it holds what JSON does not."""
    try:
        plain = json.loads(json.dumps(state))
        if plain == state:
            return {"json": plain}
    except (TypeError, ValueError):
        pass
    try:
        return {"pickle": base64.b64encode(pickle.dumps(state)).decode()}
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name}: its state_dict() cannot be saved: {error}",
            remedy="return numbers, strings, lists and dicts",
        ) from error


def _from_json(state: dict[str, Any]) -> Any:
    if "json" in state:
        return copy.deepcopy(state["json"])
    return pickle.loads(base64.b64decode(state["pickle"]))
