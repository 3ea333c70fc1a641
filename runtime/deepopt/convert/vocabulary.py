"""Whether a model has a row for every token id that its text can give.

Found before anything starts: in a worker it would be an IndexError, on a GPU a failed assertion.
What this module does not do: look into datasets of the user's own, whose ids nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepopt.config import JobConfig
from deepopt.convert.chain import named_layers
from deepopt.convert.example import example_of
from deepopt.convert.factory import build_model
from deepopt.datasets.tokenizer import load_tokenizer
from deepopt.errors import InputError


def check_vocabulary(job: JobConfig) -> None:
    """Compare the tokenizer of `data.files` with the table that the model looks its ids up in.

    Args:
        job: of a model that `describe` could describe.

    Raises:
        InputError: no such tokenizer, or the table has fewer rows than the tokenizer has tokens.
    """
    if job.data.dataset is not None:
        return
    num_tokens = load_tokenizer(job.data.tokenizer).vocab_size
    model = build_model(job, device="meta")
    table = _table_of_ids(model, ids=example_of(job).args[0].to("meta"))
    if table is None or len(table) >= num_tokens:
        return
    names = (name for name, parameter in model.named_parameters() if parameter is table)
    raise InputError(
        f"data.tokenizer: {job.data.tokenizer} has {num_tokens:,} tokens, "
        f"the model's {next(names, 'embedding')} has rows for {len(table):,}",
        remedy="give the model a larger vocabulary in model.kwargs (of the built-in model: "
        f"vocab_size: {num_tokens}), or name another tokenizer",
    )


class _FoundError(Exception):
    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table


class _Look(TorchFunctionMode):
    """Ends a forward where the ids are looked up."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self._ids = ids

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.nn.functional.embedding, torch.embedding):
            read, table = args[:2] if func is not torch.embedding else reversed(args[:2])
            if read is self._ids or read._base is self._ids:
                raise _FoundError(table)
        return func(*args, **(kwargs or {}))


def _table_of_ids(model: torch.nn.Module, *, ids: torch.Tensor) -> torch.Tensor | None:
    """The table that is read by the ids as they come; None where the model does something else with them."""
    layers = named_layers(model)
    reader = model if layers is None else layers[0][1]
    # A forward that cannot run without memory up to there tells nothing, and is no fault.
    unable = (RuntimeError, TypeError, ValueError, AttributeError)
    try:
        with suppress(*unable), torch.no_grad(), _Look(ids):
            reader(ids)
    except _FoundError as found:
        return found.table
    return None
