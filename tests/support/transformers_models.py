"""Small random models of the `transformers` library, each a model factory's target, with batches."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is downloaded

import torch
import transformers

from support.nasty_models import Adapted

VOCABULARY = 256
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(
        **_SMALL,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
    )
    return transformers.MixtralForCausalLM(config)


def mixtral_balanced() -> torch.nn.Module:
    """With the auxiliary loss of its routers, whose logits hooks collect inside the layers."""
    model = mixtral()
    model.config.output_router_logits = True
    return model


def qwen3_moe() -> torch.nn.Module:
    config = transformers.Qwen3MoeConfig(
        **_SMALL,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def llama_adapted() -> torch.nn.Module:
    """Frozen but for adapters."""
    return Adapted(llama(), parts=("q_proj", "v_proj"))


def llama_adapted_recomputed() -> torch.nn.Module:
    """The same with the library's own recomputation inside the blocks."""
    model = llama_adapted()
    model.base_model.activation_checkpointing_enable()
    model.base_model.enable_input_require_grads()
    return model


def deepseek_v3() -> torch.nn.Module:
    config = transformers.DeepseekV3Config(
        **_SMALL,
        intermediate_size=48,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=2,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt2(dropout: float = 0.0) -> torch.nn.Module:
    """Its embedding and its head are one matrix."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def t5(dropout: float = 0.0) -> torch.nn.Module:
    """Encoder and decoder share an embedding; the position bias of a first block is all blocks'."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=dropout,
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(**_SMALL, **_NO_DROPOUT, intermediate_size=48)
    return transformers.BertForMaskedLM(config)


def vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        **{k: v for k, v in _SMALL.items() if k != "vocab_size"},
        **_NO_DROPOUT,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def transformer() -> torch.nn.Module:
    """PyTorch's own, as a model over features, without dropout."""
    return torch.nn.Transformer(
        d_model=24,
        nhead=4,
        num_encoder_layers=4,
        num_decoder_layers=4,
        dim_feedforward=32,
        dropout=0.0,
        batch_first=True,
    )


class Batches:
    """Micro-batches of one kind; a function of (step, micro-batch)."""

    def __init__(self, kind: str, size: int = 2) -> None:
        self.kind = kind
        self.size = size
        self.tokens_per_microbatch = size * 12

    def batch(self, step: int, microbatch: int) -> tuple[Any, torch.Tensor]:
        generator = torch.Generator().manual_seed(step * 1000 + microbatch)

        def ids(length: int = 12) -> torch.Tensor:
            return torch.randint(1, VOCABULARY, (self.size, length), generator=generator)

        def floats(*shape: int) -> torch.Tensor:
            return torch.randn(self.size, *shape, generator=generator)

        if self.kind == "ids":
            return ids(), ids()
        if self.kind.startswith("padded"):
            mask = torch.ones(self.size, 12, dtype=torch.int64)
            mask[0, 9:] = int(self.kind == "padded late" and microbatch < 2)
            return {"input_ids": ids(), "attention_mask": mask}, ids()
        if self.kind == "labels":
            given = ids()
            return {"input_ids": given, "labels": given}, given
        if self.kind == "pairs":
            labels = ids(7)
            return {"input_ids": ids(), "labels": labels}, labels
        if self.kind == "images":
            targets = torch.randint(0, 10, (self.size,), generator=generator)
            return {"pixel_values": floats(3, 16, 16)}, targets
        assert self.kind == "features", self.kind
        mask = torch.nn.Transformer.generate_square_subsequent_mask(7)
        return {"src": floats(10, 24), "tgt": floats(7, 24), "tgt_mask": mask}, floats(7, 24)


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()
