"""Bytes, and Hugging Face tokenizers from disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from deepopt.datasets.text import Text
from deepopt.datasets.token_file import tokens_of
from deepopt.datasets.tokenizer import load_tokenizer
from deepopt.errors import InputError


def text_of(*parts: bytes) -> Text:
    names = tuple(f"f{i}" for i in range(len(parts)))
    return Text(names=names, parts=parts, description="test")


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0, "one": 1, "two": 2, "three": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_bytes_are_tokens() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = tokenizer.encode(text_of(b"ab", b"", b"\xff"))
    assert tokens.tolist() == [97, 98, 255]
    assert tokenizer.vocab_size == 256


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_a_tokenizer_on_disk_reads_file_by_file(tokenizer_folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder / name))
    tokens = tokenizer.encode(text_of(b"one two", b"three four"))
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [1, 2, 3, 0]
    assert tokenizer.vocab_size == 4


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer file"):
        load_tokenizer(str(path))


def test_text_that_is_not_utf8_is_named(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    with pytest.raises(InputError, match="f1 is not UTF-8 at byte 2"):
        tokenizer.encode(text_of(b"one", b"tw\xff"))


@pytest.mark.parametrize(
    ("name", "module"), [("some/model", "transformers"), ("{folder}", "tokenizers")]
)
def test_a_missing_library_names_the_extra(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"{module} is not installed") as caught:
        load_tokenizer(name.format(folder=tokenizer_folder))
    assert "deepopt-cuda[hf]" in caught.value.remedy


def test_a_name_that_the_library_does_not_know_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Auto:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise OSError(f"{name} is not a local folder\nand more lines")

    class Library:
        AutoTokenizer = Auto

    monkeypatch.setitem(sys.modules, "transformers", Library)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"cannot load 'no/such': no/such is not") as caught:
        load_tokenizer("no/such")
    assert "\n" not in caught.value.message


def test_tokens_are_kept_and_found_again(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    text, folder = text_of(b"one two three"), tokenizer_folder / "kept"
    first = tokens_of(text, tokenizer, folder=folder)
    (kept,) = folder.iterdir()

    class Broken:
        vocab_size, identity = tokenizer.vocab_size, tokenizer.identity

        def encode(self, text: Text) -> torch.Tensor:
            raise AssertionError("tokenized again")

    assert torch.equal(tokens_of(text, Broken(), folder=folder), first)
    with pytest.raises(AssertionError, match="tokenized again"):
        tokens_of(text_of(b"other"), Broken(), folder=folder)
    kept.write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged") as caught:
        tokens_of(text, tokenizer, folder=folder)
    assert "delete" in caught.value.remedy


def test_bytes_are_never_kept(tmp_path: Path) -> None:
    tokens_of(text_of(b"x"), load_tokenizer("bytes"), folder=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
