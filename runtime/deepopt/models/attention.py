"""Causal self-attention with rotary positions.

No cache, no masks other than causal, no attention dropout. Angles are computed in each forward:
a table would be a buffer, and buffers of a model built on the meta device have no values.

Shapes: B sequences, S positions, N heads, H features of a head, D = N x H features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotate_by_position(x_BSNH: torch.Tensor, *, base: float) -> torch.Tensor:
    """Turn each pair of features (i, i + H/2) by an angle proportional to the position.

    Args:
        x_BSNH: queries or keys, H even.
        base: of the geometric series of angles.

    Returns:
        Same shape and dtype; computed in fp32.

    Source: arXiv:2104.09864 (RoFormer), section 3.2.2, with halves instead of interleaved
        pairs.
    """
    positions, half = x_BSNH.shape[1], x_BSNH.shape[-1] // 2
    frequency_H = base ** (
        -torch.arange(half, dtype=torch.float32, device=x_BSNH.device) / half
    )
    position_S = torch.arange(positions, dtype=torch.float32, device=x_BSNH.device)
    angle_S1H = torch.outer(position_S, frequency_H).unsqueeze(1)
    cos, sin = angle_S1H.cos(), angle_S1H.sin()
    first, second = x_BSNH.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BSNH.dtype)


class CausalSelfAttention(torch.nn.Module):
    """Multi-head attention of each position to itself and those before it.

    Args:
        d_model: features.
        num_heads: divides `d_model` into heads of even size.
        rope_base: see `rotate_by_position`.
    """

    def __init__(self, d_model: int, *, num_heads: int, rope_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rope_base = rope_base
        self.qkv = torch.nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = torch.nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] to [B, S, D]."""
        heads = self.qkv(x_BSD).unflatten(-1, (3 * self.num_heads, -1))
        query_key, value = heads.split((2 * self.num_heads, self.num_heads), dim=2)
        query, key = rotate_by_position(query_key, base=self.rope_base).chunk(2, dim=2)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def reset_parameters(self, *, std: float, residual_std: float) -> None:
        """Draw the weights from the default generator.

        Args:
            std: of the input projection.
            residual_std: of the projection that adds to the residual stream.
        """
        torch.nn.init.normal_(self.qkv.weight, std=std)
        torch.nn.init.normal_(self.out.weight, std=residual_std)
