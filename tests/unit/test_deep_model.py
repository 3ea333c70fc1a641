"""`convert_to_deepopt`: a chain that can be looked at and run, over a model that stays as it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepopt import convert_to_deepopt
from support import nasty_models, transformers_models

X = torch.rand(4, 6)


def test_the_layers_of_a_transformer_are_its_encoder_then_its_decoder() -> None:
    model = torch.nn.Transformer(
        d_model=768, nhead=12, num_encoder_layers=4, num_decoder_layers=4, batch_first=True
    )
    converted = convert_to_deepopt(model, parallel_mode="bi_stream")
    assert [layer.name for layer in converted.layers] == [
        *(f"encoder.layers.{i}" for i in range(4)),
        *(f"decoder.layers.{i}" for i in range(4)),
    ]
    assert converted.placement == "mirror"
    shapes = [[spec.shape for spec in layer.alive or ()] for layer in converted.layers]
    assert shapes[1] == [(2, 10, 768)] * 2, "the encoder's state, and the decoder's input"
    assert shapes[6] == [(2, 10, 768)] * 2, "memory, and the decoder's state"


def test_costs_and_cuts_are_those_of_the_example() -> None:
    converted = convert_to_deepopt(nasty_models.Skips(), example_inputs=X)
    names = [layer.name for layer in converted.layers]
    assert names == ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert converted.layers[1].forward_flops == 2 * 2 * 4 * 8 * 16
    assert [layer.cut_bytes for layer in converted.layers] == [
        4 * 6 * 4,
        4 * 8 * 4,
        4 * 8 * 4,
        2 * 4 * 8 * 4,  # the first block's result waits for the last
        2 * 4 * 8 * 4,
        4 * 8 * 4,
    ]


def test_parameters_are_counted_once_and_named_as_in_the_state_dict() -> None:
    model = transformers_models.gpt2()
    converted = convert_to_deepopt(model, example_inputs=torch.ones(2, 12, dtype=torch.int64))
    names = [name for layer in converted.layers for name in layer.parameters]
    assert set(names) == set(model.state_dict())
    total = sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in converted.layers) == total
    assert converted.state_dict().keys() == model.state_dict().keys()


def test_every_parameter_of_a_module_used_several_times_is_counted_once() -> None:
    model = nasty_models.Recurrent()
    converted = convert_to_deepopt(model, example_inputs=X)
    assert [layer.name for layer in converted.layers][1:4] == [
        "blocks.0",
        "blocks.0#2",
        "blocks.0#3",
    ]
    total = sum(p.numel() for p in model.parameters())
    assert sum(layer.num_parameters for layer in converted.layers) == total


def test_a_mask_is_made_again_behind_a_cut_where_it_would_be_the_largest_tensor() -> None:
    length = 256
    ids = torch.ones(1, length, dtype=torch.int64)
    mask = ids.clone()
    mask[0, 200:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    converted = convert_to_deepopt(transformers_models.llama(), example_inputs=inputs)
    carried = {spec.shape for layer in converted.layers[1:] for spec in layer.alive or ()}
    assert (1, length, 32) in carried, "hidden states"
    assert (1, 1, length, length) not in carried, "the mask of scores"


def test_outputs_have_the_originals_structure_and_bits() -> None:
    model = nasty_models.TwoInputs()
    inputs = {"x": X, "mask": X[:, 0] > 0.5}
    converted = convert_to_deepopt(model, example_inputs=inputs)
    expected, found = model(**inputs), converted(**inputs)
    assert found.keys() == expected.keys()
    assert found["note"] == "as it was"
    assert torch.equal(found["logits"], expected["logits"])
    assert all(map(torch.equal, found["hidden"], expected["hidden"]))
    result = convert_to_deepopt(nasty_models.Recurrent(), example_inputs=X)(X)
    assert [field.name for field in dataclasses.fields(result)] == ["logits", "pooled", "steps"]
    assert result.steps == 3


def test_converting_changes_nothing_of_the_model() -> None:
    model = nasty_models.Counting().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    convert_to_deepopt(model, example_inputs=X)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_buffers_that_a_forward_writes_to_are_written_by_the_chain() -> None:
    model = nasty_models.Counting()
    converted = convert_to_deepopt(model, example_inputs=X)
    converted(X)
    converted(X)
    assert model.calls == 2
    assert model.norm.num_batches_tracked == 2


def test_a_model_on_the_meta_device_is_converted_without_memory() -> None:
    with torch.device("meta"):
        model = transformers_models.llama()
    ids = torch.ones(2, 12, dtype=torch.int64)
    real = convert_to_deepopt(transformers_models.llama(), example_inputs=ids)
    converted = convert_to_deepopt(model, example_inputs=ids)
    assert converted.layers == real.layers


@pytest.mark.parametrize("mode", ["line", "v", "auto", "mirror"])
def test_other_modes_are_placements(mode: str) -> None:
    assert (
        convert_to_deepopt(torch.nn.Sequential(torch.nn.Linear(2, 2)), mode).placement == mode
    )  # type: ignore[arg-type]
