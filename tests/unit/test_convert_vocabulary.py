"""A tokenizer with more tokens than the model has rows is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from deepopt.config import JobConfig
from deepopt.convert.vocabulary import check_vocabulary
from deepopt.errors import InputError
from support import transformers_models  # noqa: F401  its import keeps transformers off the network

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
HUGGING_FACE = "deepopt.models.hugging_face:build"


class Hashed(torch.nn.Module):
    """Takes any id: it looks up a remainder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.table(ids % 8)
        return embedded


class Positions(torch.nn.Module):
    """Looks up positions before tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Embedding(128, 4)
        self.tokens = torch.nn.Embedding(100, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        embedded: torch.Tensor = self.positions(places) + self.tokens(ids)
        return embedded


def job(factory: str | None = None, *, tokenizer: object = "bytes", **kwargs: Any) -> JobConfig:
    named = {} if factory is None else {"factory": factory}
    return JobConfig.model_validate(
        {"model": {**named, "kwargs": kwargs}, "data": {"tokenizer": str(tokenizer)}}
    )


def test_each_model_with_rows_enough_passes(tmp_path: Path) -> None:
    check_vocabulary(job())
    check_vocabulary(job(HUGGING_FACE, config={**GPT2, "vocab_size": 256}))
    check_vocabulary(job(f"{__name__}:Hashed"))


@pytest.mark.parametrize(
    ("refused", "place"),
    [
        (job(vocab_size=100), "embed.weight"),
        (job(HUGGING_FACE, config={**GPT2, "vocab_size": 100}), "transformer.wte.weight"),
        (job(f"{__name__}:Positions"), "tokens.weight"),
    ],
    ids=["built-in", "hugging-face", "recorded"],
)
def test_too_few_rows_are_named_with_both_numbers(refused: JobConfig, place: str) -> None:
    with pytest.raises(InputError) as caught:
        check_vocabulary(refused)
    assert "bytes has 256 tokens" in str(caught.value)
    assert f"the model's {place}" in str(caught.value)
    assert "rows for 100" in str(caught.value)


def test_a_tokenizer_of_another_library_counts_with_its_added_tokens(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    words.add_tokens(["<b>"])
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    check_vocabulary(job(tokenizer=path, vocab_size=3))
    with pytest.raises(InputError, match=r"tokenizer\.json has 3 tokens.* rows for 2"):
        check_vocabulary(job(tokenizer=path, vocab_size=2))
