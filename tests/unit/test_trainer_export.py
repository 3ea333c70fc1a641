"""`trainer.export`: the model that was trained, for other programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepopt import DeepTrainer
from deepopt.errors import InputError
from support import models, transformers_models


def test_a_model_of_transformers_becomes_a_folder_that_it_loads(tmp_path: Path) -> None:
    import transformers

    model = transformers_models.gpt2()
    DeepTrainer(model).export(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_any_model_becomes_weights_under_each_of_its_names(tmp_path: Path) -> None:
    model = models.Tied()
    DeepTrainer(model).export(tmp_path / "out", format="weights")
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    trainer = DeepTrainer(models.Tied())
    with pytest.raises(InputError, match="a Tied is no model of transformers"):
        trainer.export(tmp_path)
    with pytest.raises(InputError, match="format 'gguf' is unknown"):
        trainer.export(tmp_path, format="gguf")  # type: ignore[arg-type]
