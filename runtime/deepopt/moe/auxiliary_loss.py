"""A loss beside the main one, that acts on gradients only.

A stage in the middle of a pipeline has no scalar to add a loss to. So the loss is tied to a
tensor that flows on: forward returns the tensor unchanged, backward starts the loss's own
gradient.
"""

from __future__ import annotations

from typing import Any

import torch


def attach_loss(x: torch.Tensor, loss: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Make the backward of a tensor also the backward of a loss.

    Args:
        x: any tensor that takes part in the main loss.
        loss: scalar.
        scale: gradient that the loss receives: its coefficient, times whatever the main loss
            was multiplied by.

    Returns:
        `x`, with the same value.
    """
    out: torch.Tensor = _AttachLoss.apply(x, loss, scale)  # type: ignore[no-untyped-call]
    return out


def switch_balance_loss(
    scores_TE: torch.Tensor, tokens_per_expert_E: torch.Tensor, num_choices: int
) -> torch.Tensor:
    """How uneven the routing is: 1 when even, num_experts when one expert gets all.

    Args:
        scores_TE: fp32 scores of the tokens that count; each row sums to 1.
        tokens_per_expert_E: int64 choices that each expert received.
        num_choices: their sum, tokens x k.

    Source: arXiv:2101.03961 (Switch Transformer), section 2.2, with the fractions taken over
        all k choices.
    """
    share_E = tokens_per_expert_E.to(scores_TE.dtype) / max(num_choices, 1)
    loss: torch.Tensor = (share_E * scores_TE.mean(0)).sum() * scores_TE.shape[1]
    return loss


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.like = loss.new_empty(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
