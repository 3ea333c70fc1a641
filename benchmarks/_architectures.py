"""Ten architectures with random weights, as large as a laptop likes, each with a micro-batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing is downloaded
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers as hf

Make = Callable[[], tuple[torch.nn.Module, dict[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the models are.

    Args:
        width: of hidden states.
        depth: blocks; of encoder and decoder each, where there are both.
        length: positions of a sample.
        samples: of a micro-batch.
    """

    width: int
    depth: int
    length: int
    samples: int


def architectures(size: Size, *, dropout: float = 0.0, tied: bool = True) -> dict[str, Make]:
    """Name -> what makes the model and the keyword arguments of its forward.

    Args:
        size: of all of them.
        dropout: rate, everywhere that a model has one.
        tied: whether those that tie their head to an embedding do.
    """
    width, depth, heads, words = size.width, size.depth, 8, 1024
    shape = {
        "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
        "intermediate_size": 2 * width,
    }  # fmt: skip
    sizes, few = {**shape, "vocab_size": words}, {"num_key_value_heads": heads // 2}
    still = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sparse, own_head = {"attention_dropout": dropout}, {"tie_word_embeddings": tied}

    def ids() -> torch.Tensor:
        return torch.randint(1, words, (size.samples, size.length))

    def text(model: type[Any], config: Any) -> Make:
        def make() -> tuple[Any, dict[str, Any]]:
            given = ids()
            return model(config), {"input_ids": given, "labels": given, "use_cache": False}

        return make

    def padded() -> tuple[Any, dict[str, Any]]:
        given = ids()
        mask = torch.ones_like(given)
        mask[::3, -size.length // 4 :] = 0
        inputs = {"input_ids": given, "labels": given, "attention_mask": mask}
        return hf.BertForMaskedLM(hf.BertConfig(**sizes, **still, **own_head)), inputs

    def images() -> tuple[Any, dict[str, Any]]:
        config = hf.ViTConfig(**shape, **still, image_size=64, patch_size=8)
        pixels = torch.randn(size.samples, 3, 64, 64)
        labels = torch.arange(size.samples) % 2
        return hf.ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}

    def transformer() -> tuple[Any, dict[str, Any]]:
        model = torch.nn.Transformer(
            d_model=width, nhead=heads, num_encoder_layers=depth, num_decoder_layers=depth,
            dim_feedforward=2 * width, dropout=dropout, batch_first=True,
        )  # fmt: skip
        shape = (size.samples, size.length, width)
        return model, {"src": torch.randn(shape), "tgt": torch.randn(shape)}

    def t5() -> tuple[Any, dict[str, Any]]:
        config = hf.T5Config(
            vocab_size=words, d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=depth,
            num_heads=heads, decoder_start_token_id=0, dropout_rate=dropout, **own_head,
        )  # fmt: skip
        model, inputs = text(hf.T5ForConditionalGeneration, config)()
        if (
            not tied
        ):  # whatever the configuration says, encoder, decoder and head share a matrix
            model.decoder.set_input_embeddings(copy.deepcopy(model.shared))
            model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
        return model, inputs

    return {
        "Llama": text(hf.LlamaForCausalLM, hf.LlamaConfig(**sizes, **few, **sparse)),
        "Mixtral": text(
            hf.MixtralForCausalLM, hf.MixtralConfig(**sizes, **few, **sparse, num_local_experts=4)
        ),
        "Qwen3-MoE": text(
            hf.Qwen3MoeForCausalLM,
            hf.Qwen3MoeConfig(
                **sizes, **few, **sparse, moe_intermediate_size=width, num_experts=4,
                num_experts_per_tok=2, head_dim=width // heads,
            ),
        ),
        "DeepSeek-V3": text(
            hf.DeepseekV3ForCausalLM,
            hf.DeepseekV3Config(
                **sizes, **sparse, num_key_value_heads=heads, moe_intermediate_size=width,
                n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
                first_k_dense_replace=1, q_lora_rank=width // 4, kv_lora_rank=width // 4,
                qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
            ),
        ),
        "GPT-2 (tied)": text(
            hf.GPT2LMHeadModel,
            hf.GPT2Config(
                vocab_size=words, n_embd=width, n_layer=depth, n_head=heads,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **own_head,
            ),
        ),
        "T5": t5,
        "BART": text(
            hf.BartForConditionalGeneration,
            hf.BartConfig(
                vocab_size=words, d_model=width, encoder_layers=depth, decoder_layers=depth,
                encoder_attention_heads=heads, decoder_attention_heads=heads, dropout=dropout,
                encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
            ),
        ),
        "BERT (padded)": padded,
        "ViT": images,
        "nn.Transformer": transformer,
    }  # fmt: skip
