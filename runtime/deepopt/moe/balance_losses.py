"""Losses that act on a router's logits beside its bias: balance of the batch, of each sequence, and
the size of the logits.

Shapes: B sequences, T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepopt.config import ElbConfig
from deepopt.moe.auxiliary_loss import attach_loss, switch_balance_loss

_SMALLEST_SUM = 1e-20  # keeps the division finite when every sigmoid underflows


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What the losses are made of.

    Args:
        logits_TE: fp32, with gradients.
        scores_TE: softmax or sigmoid of them.
        ids_TK: the choices without bias.
        load_E: choices of each expert that the batch's loss reckons with.
        counted_T: bool, the tokens that count; None: all.
        sequence_length: tokens of a sequence.
    """

    logits_TE: torch.Tensor
    scores_TE: torch.Tensor
    ids_TK: torch.Tensor
    load_E: torch.Tensor
    counted_T: torch.Tensor | None
    sequence_length: int


def wants_losses(elb: ElbConfig) -> bool:
    """Whether any of the losses has a weight."""
    is_aux = elb.mode == "aux" and elb.aux_coefficient > 0
    return is_aux or elb.sequence_coefficient > 0 or elb.z_coefficient > 0


def attach_losses(
    weights_TK: torch.Tensor, routed: Routed, *, elb: ElbConfig, loss_scale: float
) -> torch.Tensor:
    """Let the backward of the gate weights be that of the losses, too.

    Args:
        weights_TK: gate weights.
        routed: what was routed.
        elb: which losses, and their weights.
        loss_scale: what the main loss is multiplied by.

    Returns:
        The same values.
    """
    shares_TE = routed.scores_TE / routed.scores_TE.sum(-1, keepdim=True).clamp_min(
        _SMALLEST_SUM
    )
    counted_T = routed.counted_T
    if elb.z_coefficient:
        z_T = routed.logits_TE.logsumexp(-1).square()
        loss = (z_T if counted_T is None else z_T[counted_T]).mean()
        weights_TK = attach_loss(weights_TK, loss, scale=elb.z_coefficient * loss_scale)
    if elb.mode == "aux" and elb.aux_coefficient:
        own_TE = shares_TE if counted_T is None else shares_TE[counted_T]
        loss = switch_balance_loss(own_TE, routed.load_E, int(routed.load_E.sum()))
        weights_TK = attach_loss(weights_TK, loss, scale=elb.aux_coefficient * loss_scale)
    if elb.sequence_coefficient:
        loss = sequence_loss(
            shares_TE, routed.ids_TK, counted_T, sequence_length=routed.sequence_length
        )
        weights_TK = attach_loss(weights_TK, loss, scale=elb.sequence_coefficient * loss_scale)
    return weights_TK


def sequence_loss(
    shares_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    sequence_length: int,
) -> torch.Tensor:
    """The balance loss of each sequence on its own, averaged: 1 when even.

    Args:
        shares_TE: scores as shares; each row sums to 1.
        ids_TK: choices.
        counted_T: bool, the tokens that count; None: all.
        sequence_length: T is a multiple of it.

    Source: arXiv:2412.19437 (DeepSeek-V3), equations 17 to 20.
    """
    num_experts, top_k = shares_TE.shape[1], ids_TK.shape[1]
    ones_TE = torch.zeros_like(shares_TE).scatter_(1, ids_TK, 1.0)
    if counted_T is None:
        tokens_B = shares_TE.new_full(
            (shares_TE.shape[0] // sequence_length,), float(sequence_length)
        )
    else:
        kept_T1 = counted_T.to(shares_TE.dtype).unsqueeze(-1)
        ones_TE, shares_TE = ones_TE * kept_T1, shares_TE * kept_T1
        tokens_B = kept_T1.view(-1, sequence_length).sum(1).clamp_min(1)
    f_BE = ones_TE.view(-1, sequence_length, num_experts).sum(1) * num_experts / top_k
    p_BE = shares_TE.view(-1, sequence_length, num_experts).sum(1)
    loss: torch.Tensor = ((f_BE * p_BE).sum(-1) / tokens_B.square()).mean()
    return loss
