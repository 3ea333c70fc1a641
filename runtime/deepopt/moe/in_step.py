"""Feedback inside the step: position chunks that follow the queues of earlier chunks.

Each sequence of a micro-batch is cut into chunks of positions. What the earlier chunks sent to each
device (or expert) tells how long its queue is; the load formula 1 + alpha x deficit / mean load turns
that into a bias for the next chunk. In the warm-up, where the step's bias may fit nothing, what the
first 1, 2, 4, 8 ... chunks needed becomes the bias of those after them. No token sees a later one, and
none sees another micro-batch.

Shapes: B sequences, S positions, T = B x S tokens, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepopt.moe.balancer import HIGH, LOW
from deepopt.moe.warmup import solve_bias
from deepopt_kernels.elb_select import elb_select

_ROUNDS = 4  # of solving: from the bias of half as many chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """How strongly what is fed back.

    Args:
        alpha: gain of the formula.
        chunks: of each sequence.
        blocks: (first, end) of experts whose joint load shall be even; one each at expert level.
        slope_E: change of the bias that multiplies an expert's load by e.
        share_E: target share of each expert; sums to 1.
        solves: set the bias anew from what earlier chunks needed; for equal shares.
    """

    alpha: float
    chunks: int
    blocks: Sequence[tuple[int, int]]
    slope_E: torch.Tensor
    share_E: torch.Tensor
    solves: bool = False


def select_in_chunks(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    *,
    top_k: int,
    num_bins: int,
    counted_T: torch.Tensor | None,
    sequence_length: int,
    feedback: Feedback,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `elb_select`, chunk after chunk.

    Args:
        u_TE: sequence after sequence, each of `sequence_length` tokens.
        bias_E: of the step.
        origin_E: see `elb_select`.
        width_E: see `elb_select`.
        top_k: see `elb_select`.
        num_bins: see `elb_select`.
        counted_T: see `elb_select`.
        sequence_length: S; T is a multiple of it.
        feedback: how strongly what is fed back.
        num_groups: see `elb_select`.
        top_groups: see `elb_select`.
    """
    num_experts = u_TE.shape[1]
    u_BSE = u_TE.view(-1, sequence_length, num_experts)
    counted_BS = None if counted_T is None else counted_T.view(-1, sequence_length)
    num_chunks = min(feedback.chunks, sequence_length)
    ids_BSK = torch.empty(*u_BSE.shape[:2], top_k, dtype=torch.int64, device=u_TE.device)
    member_EN = _membership(feedback.blocks, num_experts, u_TE.device)
    size_N = member_EN.sum(0)
    total: torch.Tensor | None = None
    for chunk in range(num_chunks):
        start = chunk * sequence_length // num_chunks
        end = (chunk + 1) * sequence_length // num_chunks
        if feedback.solves and chunk.bit_count() == 1:  # after 1, 2, 4, 8 ... chunks
            seen_TE = u_BSE[:, :start].reshape(-1, num_experts)
            counted = None if counted_BS is None else counted_BS[:, :start].reshape(-1)
            bias_E = _solved(seen_TE, bias_E, counted, top_k=top_k)
        v_bias = bias_E
        if total is not None:
            tokens = u_BSE.shape[0] * (end - start)
            v_bias = bias_E + _push(
                total, num_experts, tokens, top_k, member_EN, size_N, feedback
            )
        u_cE = u_BSE[:, start:end].reshape(-1, num_experts)
        counted = None if counted_BS is None else counted_BS[:, start:end].reshape(-1)
        ids, stats = elb_select(
            u_cE,
            v_bias,
            origin_E,
            width_E,
            top_k=top_k,
            num_bins=num_bins,
            counted_T=counted,
            num_groups=num_groups,
            top_groups=top_groups,
        )
        ids_BSK[:, start:end] = ids.view(-1, end - start, top_k)
        total = stats if total is None else total + stats
    assert total is not None, "a sequence has a position"
    return ids_BSK.view(-1, top_k), total


def _solved(
    seen_TE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    top_k: int,
) -> torch.Tensor:
    """[E] the bias that would have evened out the tokens so far."""
    own_TE = seen_TE if counted_T is None else seen_TE[counted_T]
    own_TE = own_TE[own_TE.isfinite().all(-1)] + bias_E
    return bias_E + solve_bias(own_TE, top_k=top_k, rounds=_ROUNDS)


def _push(
    total: torch.Tensor,
    num_experts: int,
    tokens: int,
    top_k: int,
    member_EN: torch.Tensor,
    size_N: torch.Tensor,
    feedback: Feedback,
) -> torch.Tensor:
    """[E] what the queues so far add to the bias of the next chunk."""
    rest = total[-(num_experts + 2) :]
    load_E, so_far = rest[:num_experts].float(), rest[num_experts].float()
    deficit_E = top_k * so_far * feedback.share_E - load_E
    mean_E = (member_EN @ ((deficit_E @ member_EN) / size_N)).to(torch.float32)
    next_E = (top_k * tokens * feedback.share_E).clamp_min(1e-6)
    factor_E = (1.0 + feedback.alpha * mean_E / next_E).clamp(LOW, HIGH)
    return feedback.slope_E * factor_E.log()


def _membership(
    blocks: Sequence[tuple[int, int]], num_experts: int, device: torch.device
) -> torch.Tensor:
    """[E, N] 1 where an expert belongs to a block."""
    member_EN = torch.zeros(num_experts, len(blocks), device=device)
    for block, (start, end) in enumerate(blocks):
        member_EN[start:end, block] = 1.0
    return member_EN
