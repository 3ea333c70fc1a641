"""Tokens to experts and back: sorted by expert once, moved by gathers alone.

Forward and backward only read rows by index and never add into a row by index, so the bits are
the same on every run and with any number of threads. Does not route, and does not leave the
device.

Shapes: T tokens, D features, E experts, K choices a token, R = T x K rows sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """Where each choice of each token lies among the rows sorted by expert.

    Args:
        token_R: int64, the token of each row.
        row_TK: int64, the row of each choice.
        counts: rows of each expert.
    """

    token_R: torch.Tensor
    row_TK: torch.Tensor
    counts: tuple[int, ...]


def plan_dispatch(ids_TK: torch.Tensor, *, num_experts: int) -> Dispatch:
    """Sort the choices by expert; within an expert they stay in token order.

    Args:
        ids_TK: int64 expert of each choice.
        num_experts: E.
    """
    flat_R = ids_TK.flatten()
    order_R = flat_R.sort(stable=True).indices
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    counts = torch.bincount(flat_R, minlength=num_experts)
    return Dispatch(
        token_R=order_R // ids_TK.shape[1],
        row_TK=row_R.view_as(ids_TK),
        counts=tuple(counts.tolist()),
    )


def scatter_to_experts(x_TD: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
    """Copy each token to the rows of its experts: [T, D] to [R, D]."""
    out: torch.Tensor = _Scatter.apply(  # type: ignore[no-untyped-call]
        x_TD, dispatch.token_R, dispatch.row_TK
    )
    return out


def gather_from_experts(
    y_RD: torch.Tensor, weights_TK: torch.Tensor, dispatch: Dispatch
) -> torch.Tensor:
    """Add up what a token's experts gave, each times its gate weight.

    Args:
        y_RD: rows sorted by expert.
        weights_TK: fp32; the sum is in fp32, too.
        dispatch: that sorted the rows.

    Returns:
        [T, D] of the dtype of `y_RD`.
    """
    out: torch.Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
        y_RD, weights_TK, dispatch.token_R, dispatch.row_TK
    )
    return out


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_R: torch.Tensor, row_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[Any, ...]:
        (row_TK,) = ctx.saved_tensors
        return _rows_of(grad_RD, row_TK).sum(1), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_RD: torch.Tensor,
        weights_TK: torch.Tensor,
        token_R: torch.Tensor,
        row_TK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(y_RD, weights_TK, token_R, row_TK)
        return (_rows_of(y_RD, row_TK) * weights_TK.unsqueeze(-1)).sum(1).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[Any, ...]:
        y_RD, weights_TK, token_R, row_TK = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            weights_R = torch.empty_like(weights_TK).flatten()
            weights_R[row_TK.flatten()] = weights_TK.flatten()
            grad_y = (grad_TD.index_select(0, token_R) * weights_R.unsqueeze(-1)).to(y_RD.dtype)
        if ctx.needs_input_grad[1]:
            products_TKD = _rows_of(y_RD, row_TK).float() * grad_TD.unsqueeze(1)
            grad_weights = products_TKD.sum(-1)
        return grad_y, grad_weights, None, None


def _rows_of(rows_RD: torch.Tensor, row_TK: torch.Tensor) -> torch.Tensor:
    """[R, D] to [T, K, D]."""
    return rows_RD.index_select(0, row_TK.flatten()).view(*row_TK.shape, rows_RD.shape[1])
