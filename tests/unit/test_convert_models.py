"""Models that nobody here wrote: cut at every place they give the bits that they give whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepopt import convert_to_deepopt
from deepopt.convert import describe
from deepopt.convert.example import example_of
from deepopt.errors import InputError, TrainingError
from support import transformers_models
from support.converted import in_stages, make_job, of_original

PEFT_ASKS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
HF, NASTY = "support.transformers_models", "support.nasty_models"

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        name: (f"{HF}:{name}", f"{HF}:Batches", {"kind": kind})
        for name, kind in (
            ("llama", "ids"),
            ("mixtral_balanced", "labels"),
            ("qwen3_moe", "labels"),
            ("llama_adapted", "labels"),
            ("llama_adapted_recomputed", "labels"),
            ("gpt2", "labels"),
            ("t5", "pairs"),
            ("bert", "padded"),
            ("vit", "images"),
            ("transformer", "features"),
        )
    },
    "padded llama": (f"{HF}:llama", f"{HF}:Batches", {"kind": "padded"}),
    **{
        name: (f"{NASTY}:{name}", f"{NASTY}:Batches", {})
        for name in (
            "Skips",
            "Recurrent",
            "Counting",
            "Custom",
            "Branching",
            "Handing",
            "Compiled",
        )
    },
    "TwoInputs": (f"{NASTY}:TwoInputs", f"{NASTY}:Batches", {"mask": True}),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch's compiler
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_originals_bit_for_bit(name: str) -> None:
    factory, dataset, data = MODELS[name]
    loss = f"{HF}:mean_square" if name == "transformer" else None
    job = make_job(factory, dataset, loss=loss, **data)
    expected_loss, expected = of_original(job)
    num_layers = len(describe(job).layers)
    for boundaries in ([0], [0, num_layers // 2], list(range(num_layers))):
        for recompute in (False, True):
            found_loss, found, _ = in_stages(job, boundaries, recompute=recompute)
            assert torch.equal(found_loss, expected_loss)
            assert len(found) == len({id(grad) for grad in expected.values()})
            unequal = [n for n, g in found.items() if not torch.equal(expected[n], g)]
            assert not unequal, f"cut at {boundaries}: {unequal}"


def test_random_numbers_between_layers_are_drawn_once_wherever_the_cuts_are() -> None:
    job = make_job(f"{NASTY}:Noisy", f"{NASTY}:Batches")
    num_layers = len(describe(job).layers)
    expected_loss, expected, _ = in_stages(job, [0])
    assert not torch.equal(expected_loss, of_original(job)[0]), (
        "a layer draws from its own seed"
    )
    for boundaries in ([0, num_layers // 2], list(range(num_layers))):
        for recompute in (False, True):
            loss, grads, _ = in_stages(job, boundaries, recompute=recompute)
            assert torch.equal(loss, expected_loss)
            assert not [n for n, g in grads.items() if not torch.equal(expected[n], g)]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_micro_batches_with_and_without_padding_train_alike(name: str) -> None:
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(transformers_models, name)().train()
    given, _ = transformers_models.Batches("padded").batch(1, 0)
    whole = {**given, "attention_mask": torch.ones_like(given["attention_mask"])}
    converted = convert_to_deepopt(model, example_inputs=given)
    for inputs in (whole, given):
        found = []
        for forward in (model, converted):
            model.zero_grad()
            logits = forward(**inputs).logits
            logits.square().mean().backward()
            found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        # Without padding the library calls attention in another way: the bits are those of the example's.
        rtol, atol = (0.0, 0.0) if inputs is given else (1e-5, 1e-7)
        for expected, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
    without = convert_to_deepopt(model, example_inputs=whole)
    without(**whole)
    with pytest.raises(TrainingError, match=r"masking_utils\.py:\d+: .*another way") as refused:
        without(**given)
    assert "attn_implementation" in refused.value.remedy


def test_a_job_learns_its_masks_from_a_padded_micro_batch() -> None:
    job = make_job(f"{HF}:bert", f"{HF}:Batches", kind="padded late")
    job = job.model_copy(
        update={"training": job.training.model_copy(update={"microbatches": 3})}
    )
    assert not example_of(job).kwargs["attention_mask"].all()


def _adapted(kind: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    import peft

    settings: dict[str, Any] = {
        "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
        "ia3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        "prompt": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(0)
    model: torch.nn.Module = peft.get_peft_model(transformers_models.llama(), settings[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    inputs, _ = transformers_models.Batches("labels").batch(1, 0)
    return model.train(), inputs


@PEFT_ASKS
@pytest.mark.parametrize("kind", ["dora", "ia3", "prompt"])
def test_adapters_of_other_kinds_keep_their_bits(kind: str) -> None:
    model, inputs = _adapted(kind)
    converted = convert_to_deepopt(model, example_inputs=inputs)
    found = []
    for forward in (model, converted):
        model.zero_grad()
        loss = forward(**inputs).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@PEFT_ASKS
def test_a_prefix_lies_in_a_cache_and_is_refused() -> None:
    model, inputs = _adapted("prefix")
    with pytest.raises(
        InputError, match=r"DynamicCache that carries tensors from layer to layer"
    ):
        convert_to_deepopt(model, example_inputs=inputs)
