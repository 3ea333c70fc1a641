"""Models that nobody here wrote: cut at every place they give the bits that they give whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepopt.convert import describe
from support.converted import in_stages, make_job, of_original

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
