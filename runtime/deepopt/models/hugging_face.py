"""Models of the `transformers` library as a job's `model.factory`, by name or by configuration.

    model:
      factory: deepopt.models.hugging_face:build
      kwargs: {name: gpt2}

`transformers` comes with the extra `[hf]`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from deepopt.errors import InputError

_MISSPELT = 0.85  # likeness: one wrong letter in six


def build(
    *,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    auto_class: str = "AutoModelForCausalLM",
    pretrained: bool = True,
    **options: Any,
) -> torch.nn.Module:
    """A model with the weights of its name, or a new one from a configuration.

    Parameters are float32: the job's `precision.dtype` says what they compute in.

    Args:
        name: on the Hub, or a folder that `save_pretrained` or `deepopt export --format hf` wrote.
        config: entries of its configuration that shall differ; without a name all that are not the
            library's defaults, with `model_type` among them.
        auto_class: of `transformers`, for what the model is trained for.
        pretrained: take the weights of `name`; False: new ones, from the job's seed.
        options: further arguments of `from_pretrained` and `from_config`, for example
            `attn_implementation`.

    Raises:
        InputError: `transformers` is not installed, or there is no such class, name or type.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "model.factory: transformers is not installed",
            remedy="pip install 'deepopt-cuda[hf]'",
        ) from error
    kind = getattr(transformers, auto_class, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise InputError(
            f"model.kwargs.auto_class: transformers has no {auto_class!r}",
            remedy="for example AutoModelForCausalLM or AutoModelForSequenceClassification",
        )
    settings = _settings(transformers, name, dict(config or {}))
    on_meta = torch.get_default_device().type == "meta"
    if name is None or not pretrained or on_meta:
        model: torch.nn.Module = kind.from_config(settings, dtype=torch.float32, **options)
        return model
    try:
        loaded: torch.nn.Module = kind.from_pretrained(
            name, config=settings, dtype=torch.float32, **options
        )
    except OSError as error:
        raise _not_found(name, error) from error
    return loaded


def _settings(transformers: Any, name: str | None, changes: dict[str, Any]) -> Any:
    if name is not None:
        try:
            found = transformers.AutoConfig.from_pretrained(name, **changes)
        except (OSError, ValueError) as error:
            raise _not_found(name, error) from error
        _refuse_misspelt(changes, kind=type(found))
        return found
    model_type = changes.pop("model_type", None)
    if model_type is None:
        raise InputError(
            "model.kwargs: neither a name nor a configuration with model_type",
            remedy="set name: gpt2, or config: {model_type: llama, ...}",
        )
    try:
        made = transformers.AutoConfig.for_model(model_type, **changes)
    except ValueError as error:
        raise InputError(
            f"model.kwargs.config.model_type: transformers knows no {model_type!r}",
            remedy="for example gpt2, llama, mixtral, qwen3_moe, t5 or bert",
        ) from error
    _refuse_misspelt(changes, kind=type(made))
    return made


def _refuse_misspelt(changes: Mapping[str, Any], *, kind: Any) -> None:
    """Find entries that are nearly those of a configuration: the library takes any, and says nothing.

    Those like none of them are left alone: older names that the library still translates are among them.

    Args:
        changes: entries that the user gave.
        kind: class of the configuration.

    Raises:
        InputError: one is misspelt.
    """
    default = kind()
    known = {*vars(default), *kind.attribute_map, *inspect.signature(kind.__init__).parameters}
    for name in changes:
        if name in known or hasattr(default, name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT)
        if close:
            raise InputError(
                f"model.kwargs.config: {kind.__name__} has no {name!r}",
                remedy=f"did you mean {close[0]}?",
            )


def _not_found(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0]
    return InputError(
        f"model.kwargs.name: transformers cannot load {name!r}: {reason}",
        remedy="check the spelling; without a network, name a folder",
    )
