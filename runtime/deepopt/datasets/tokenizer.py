"""Text to token ids: bytes as they are, or a Hugging Face tokenizer (extra `[hf]`).

Files are tokenized one by one, without special tokens. Keeps nothing on disk (`token_file`
does).
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from deepopt.datasets.text import Text
from deepopt.errors import InputError

BYTES = "bytes"


class Tokenizer(Protocol):
    """Makes token ids.

    Attributes:
        vocab_size: ids are below it.
        identity: the same for two tokenizers that give the same ids.
    """

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        ...

    @property
    def identity(self) -> str:
        """The same for two tokenizers that give the same ids."""
        ...

    def encode(self, text: Text) -> torch.Tensor:
        """All files one after the other: [tokens], uint8 or int32."""
        ...


class ByteTokenizer:
    """Each byte is a token; it can read anything."""

    vocab_size = 256
    identity = BYTES

    def encode(self, text: Text) -> torch.Tensor:
        """All files one after the other: [tokens] uint8."""
        return torch.frombuffer(bytearray().join(text.parts), dtype=torch.uint8)


def load_tokenizer(name: str) -> Tokenizer:
    """Get a tokenizer by the name that `data.tokenizer` gives.

    Args:
        name: `bytes`; a `tokenizer.json`, or a folder with one; or a name that `transformers`
            knows.

    Raises:
        InputError: a library is missing, or there is no such tokenizer.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if path.is_file():
        return _load_file(path)
    return _load_by_name(name)


class _FileTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.identity = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: Text) -> torch.Tensor:
        encodings = self._tokenizer.encode_batch(_decoded(text), add_special_tokens=False)
        return _joined([encoding.ids for encoding in encodings])


class _NamedTokenizer:
    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.identity = f"{name}/{len(tokenizer)}"

    def encode(self, text: Text) -> torch.Tensor:
        batch = self._tokenizer(_decoded(text), add_special_tokens=False, verbose=False)
        return _joined(batch["input_ids"])


def _load_file(path: Path) -> Tokenizer:
    library = _import_extra("tokenizers")
    try:
        return _FileTokenizer(library.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"data.tokenizer: {path} is not a tokenizer file: {error}",
            remedy="name a tokenizer.json written by Hugging Face tokenizers",
        ) from error


def _load_by_name(name: str) -> Tokenizer:
    library = _import_extra("transformers")
    try:
        return _NamedTokenizer(library.AutoTokenizer.from_pretrained(name), name=name)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"data.tokenizer: cannot load {name!r}: {first_line}",
            remedy="check the name, the network and the Hub's cache, or name a folder or a "
            "tokenizer.json on disk",
        ) from error


def _import_extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f"data.tokenizer: {module} is not installed, which all tokenizers but 'bytes' need",
            remedy="pip install 'deepopt-cuda[hf]', or set data.tokenizer to bytes",
        ) from error


def _decoded(text: Text) -> list[str]:
    decoded = []
    for name, part in zip(text.names, text.parts, strict=True):
        try:
            decoded.append(part.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"data.files: {name} is not UTF-8 at byte {error.start}",
                remedy="convert or leave out the file, or set data.tokenizer to bytes",
            ) from error
    return decoded


def _joined(ids: list[list[int]]) -> torch.Tensor:
    return torch.cat([torch.tensor(part, dtype=torch.int32) for part in ids])
