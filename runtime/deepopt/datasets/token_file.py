"""Token ids kept in the run directory, so that a restarted worker does not tokenize again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deepopt.datasets.text import Text
from deepopt.datasets.tokenizer import ByteTokenizer, Tokenizer
from deepopt.errors import InputError

_KEY = "tokens"


def tokens_of(text: Text, tokenizer: Tokenizer, *, folder: Path | None) -> torch.Tensor:
    """Token ids of a text, from the folder if they are there.

    Args:
        text: what to tokenize.
        tokenizer: how.
        folder: made when needed; several workers may write at once. None: keep nothing. Bytes
            are never kept.

    Raises:
        InputError: a kept file is damaged.
    """
    if folder is None or isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode(text)
    key = hashlib.sha256(f"{text.fingerprint()}/{tokenizer.identity}".encode()).hexdigest()
    path = folder / f"{key[:32]}.safetensors"
    if path.exists():
        return _load(path)
    tokens = tokenizer.encode(text)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({_KEY: tokens}, unfinished)
    unfinished.replace(path)
    return tokens


def _load(path: Path) -> torch.Tensor:
    try:
        return load_file(path)[_KEY]
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"the kept tokens in {path} are damaged: {error}", remedy="delete the file"
        ) from error
