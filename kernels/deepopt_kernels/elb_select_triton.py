"""`elb_select` on CUDA: one Triton kernel, a row of experts in registers.

Counts are integers added atomically, so their order does not matter and repeated runs give the same
bits. Experts must fit one block (at most 1,024); groups of experts are left to the reference.

Shapes: T tokens, E experts, K choices a token, B bins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from deepopt_kernels.elb_select import NEAR, num_stats

MOST_EXPERTS = 1024  # of one row in registers
_ELEMENTS = 4096  # of one program: tokens x experts


def elb_select_triton(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    top_k: int,
    num_bins: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `deepopt_kernels.elb_select.elb_select`, which defines it.

    Raises:
        ValueError: more experts than one block holds.
    """
    num_tokens, num_experts = u_TE.shape
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"{num_experts} experts are more than {MOST_EXPERTS}, one row's worth")
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=u_TE.device)
    stats = torch.zeros(num_stats(num_experts, num_bins), dtype=torch.int32, device=u_TE.device)
    if num_tokens == 0:
        return ids_TK, stats
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, _ELEMENTS // block_e)
    has_mask = counted_T is not None
    _select[(triton.cdiv(num_tokens, block_t),)](
        u_TE.contiguous(),
        bias_E,
        origin_E,
        width_E,
        u_TE if counted_T is None else counted_T.to(torch.int8),
        ids_TK,
        stats,
        num_tokens,
        num_experts,
        NEAR,
        TOP_K=top_k,
        NUM_BINS=num_bins if top_k < num_experts else 0,
        LOADS=num_experts * num_bins,
        HAS_MASK=has_mask,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
    )
    return ids_TK, stats


@triton.jit  # type: ignore[untyped-decorator]
def _select(
    u_ptr: Any,
    bias_ptr: Any,
    origin_ptr: Any,
    width_ptr: Any,
    counted_ptr: Any,
    ids_ptr: Any,
    stats_ptr: Any,
    num_tokens: Any,
    num_experts: Any,
    near: Any,
    TOP_K: tl.constexpr,
    NUM_BINS: tl.constexpr,
    LOADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    in_tokens = tokens < num_tokens
    in_experts = experts < num_experts
    inside = in_tokens[:, None] & in_experts[None, :]
    offsets = tokens[:, None].to(tl.int64) * num_experts + experts[None, :]
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + experts, mask=in_experts, other=0.0)
    v = u + bias[None, :]
    # NaN is the highest, as in torch.topk: +inf stands for it.
    v = tl.where(v == v, v, float("inf"))
    v = tl.where(inside, v, float("-inf"))
    best = tl.max(v, axis=1)
    fine = (best < float("inf")) & (best > float("-inf")) & in_tokens
    wanted = in_tokens
    if HAS_MASK:
        wanted = in_tokens & (
            tl.load(counted_ptr + tokens, mask=in_tokens, other=0).to(tl.int32) != 0
        )
    counts = fine & wanted
    ones = tl.full([BLOCK_T], 1, tl.int32)
    left = in_experts[None, :] & (tokens[:, None] >= 0)  # not chosen yet
    for place in tl.static_range(TOP_K):
        top = tl.max(tl.where(left, v, float("-inf")), axis=1)
        is_top = left & (v == top[:, None])
        chosen = tl.min(tl.where(is_top, experts[None, :], BLOCK_E), axis=1)
        tl.store(
            ids_ptr + tokens.to(tl.int64) * TOP_K + place, chosen.to(tl.int64), mask=in_tokens
        )
        tl.atomic_add(stats_ptr + LOADS + chosen, ones, mask=counts)
        left = left & (experts[None, :] != chosen[:, None])
    tl.atomic_add(stats_ptr + LOADS + num_experts, tl.sum(counts.to(tl.int32), axis=0))
    tl.atomic_add(
        stats_ptr + LOADS + num_experts + 1,
        tl.sum((wanted & ~fine).to(tl.int32), axis=0),
    )
    if NUM_BINS > 0:
        cutoff = tl.max(tl.where(left, v, float("-inf")), axis=1)
        origin = tl.load(origin_ptr + experts, mask=in_experts, other=0.0)
        width = tl.load(width_ptr + experts, mask=in_experts, other=1.0)
        z = tl.div_rn(
            (cutoff[:, None] - u) - origin[None, :], tl.broadcast_to(width[None, :], u.shape)
        )
        z = tl.div_rn(z, tl.abs(z) + near)
        z = (z + 1.0) * (NUM_BINS / 2)
        z = tl.where(z == z, z, NUM_BINS - 1.0)
        bins = tl.minimum(tl.maximum(z, 0.0), NUM_BINS - 1.0).to(tl.int32)
        tl.atomic_add(
            stats_ptr + experts[None, :] * NUM_BINS + bins,
            tl.full([BLOCK_T, BLOCK_E], 1, tl.int32),
            mask=inside & counts[:, None],
        )
