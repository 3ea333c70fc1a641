"""Models of transformers by name or configuration; no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.errors import InputError
from deepopt.models.hugging_face import build
from support import transformers_models  # its import keeps transformers off the network

SMALL: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
}


def test_a_configuration_gives_a_new_model_in_float32() -> None:
    model = build(config=SMALL, attn_implementation="eager")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_folder_gives_its_weights_and_on_meta_only_its_shape(tmp_path: Path) -> None:
    saved = build(config=SMALL).bfloat16()
    saved.save_pretrained(tmp_path)
    loaded = build(name=str(tmp_path))
    for (name, a), b in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a, b.float()), name
    with torch.device("meta"):
        described = build(name=str(tmp_path))
    assert all(p.is_meta for p in described.parameters())
    assert [tuple(p.shape) for p in described.parameters()] == [
        tuple(p.shape) for p in saved.parameters()
    ]


def test_new_weights_of_a_known_name_differ_and_its_configuration_can_be_changed(
    tmp_path: Path,
) -> None:
    saved = build(config=SMALL)
    saved.save_pretrained(tmp_path)
    other = build(name=str(tmp_path), config={"n_layer": 1}, pretrained=False)
    assert len(other.transformer.h) == 1
    assert not torch.equal(other.transformer.wte.weight, saved.transformer.wte.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither a name nor a configuration"),
        ({"config": {"model_type": "gpt22"}}, "knows no 'gpt22'"),
        ({"name": "/no/such/folder"}, "cannot load '/no/such/folder'"),
        ({"config": SMALL, "auto_class": "AutoModelForChess"}, "has no 'AutoModelForChess'"),
        ({"config": {**SMALL, "n_layers": 2}}, "GPT2Config has no 'n_layers'"),
    ],
)
def test_what_does_not_exist_is_named(arguments: dict[str, Any], message: str) -> None:
    assert transformers_models.VOCABULARY
    with pytest.raises(InputError, match=message):
        build(**arguments)


def test_a_misspelt_entry_is_found_where_the_rest_comes_from_a_name(tmp_path: Path) -> None:
    build(config=SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="GPT2Config has no 'n_heads'") as caught:
        build(name=str(tmp_path), config={"n_heads": 1}, pretrained=False)
    assert caught.value.remedy == "did you mean n_head?"


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": 32},  # another name of n_embd
        {"rope_theta": 1e4},  # of older versions, in others
        {"output_attentions": False},  # a property
        {"attn_pdrop": 0.0, "torch_dtype": "float32", "my_own_note": "kept"},
    ],
)
def test_entries_that_are_no_slip_are_left_to_the_library(entries: dict[str, Any]) -> None:
    assert build(config={**SMALL, **entries}) is not None
