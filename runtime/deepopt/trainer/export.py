"""A model at hand as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from deepopt.errors import InputError


def export_model(
    model: torch.nn.Module, directory: Path, *, kind: Literal["hf", "weights"]
) -> None:
    """Write a model's weights.

    Args:
        model: with values.
        directory: where to; made if need be.
        kind: `hf`: `config.json` and safetensors that `from_pretrained` loads; `weights`:
            `model.safetensors` with each name of the `state_dict`.

    Raises:
        InputError: the kind is unknown, or `hf`, and the model is none of `transformers`.
    """
    if kind not in ("hf", "weights"):
        raise InputError(f"export: format {kind!r} is unknown", remedy="hf or weights")
    if kind == "hf":
        own: Any = model
        if not hasattr(own, "save_pretrained"):
            raise InputError(
                f"export: a {type(model).__name__} is no model of transformers: it has no "
                "save_pretrained",
                remedy='give format="weights"',
            )
        own.save_pretrained(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    # Copies: the file format holds no tensor twice, and tied weights have several names.
    values = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
