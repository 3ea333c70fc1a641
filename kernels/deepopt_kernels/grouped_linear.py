"""One linear map an expert, over rows sorted by expert: the PyTorch reference that defines the
operation.

It does not sort, route or combine; `deepopt.moe.dispatch` does. Each expert is a product of its
own, forward and backward; a fast kernel must agree with that.

Shapes: T rows, E experts, D input features, H output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepopt_kernels.weight_grad import WeightGradHolder, produce


def grouped_linear(
    x_TD: torch.Tensor,
    weight_EHD: torch.Tensor,
    counts: Sequence[int],
    *,
    holder: WeightGradHolder | None = None,
) -> torch.Tensor:
    """Multiply each expert's rows by that expert's weight.

    Args:
        x_TD: rows sorted by expert: the first `counts[0]` belong to expert 0, and so on.
        weight_EHD: one [H, D] matrix an expert, of the dtype of `x_TD`.
        counts: rows of each expert; they add up to T. An expert without rows gets a zero
            gradient.
        holder: asked in backward for a queue that puts the weight gradient off; None computes
            it at once.

    Returns:
        [T, H], rows in the same order.

    Raises:
        ValueError: the shapes or counts do not fit.
    """
    if x_TD.dim() != 2 or weight_EHD.dim() != 3 or x_TD.shape[1] != weight_EHD.shape[2]:
        raise ValueError(
            f"x of shape {tuple(x_TD.shape)} does not fit weights of shape "
            f"{tuple(weight_EHD.shape)}: want [T, D] and [E, H, D]"
        )
    if len(counts) != weight_EHD.shape[0] or min(counts) < 0 or sum(counts) != x_TD.shape[0]:
        raise ValueError(
            f"counts {list(counts)} do not share {x_TD.shape[0]} rows "
            f"among {weight_EHD.shape[0]} experts"
        )
    out: torch.Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x_TD, weight_EHD, tuple(counts), holder
    )
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_EHD: torch.Tensor,
        counts: tuple[int, ...],
        holder: WeightGradHolder | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD)
        ctx.weight = weight_EHD
        ctx.counts = counts
        ctx.holder = holder
        out_TH = x_TD.new_empty(x_TD.shape[0], weight_EHD.shape[1])
        for expert, rows in _row_ranges(counts):
            torch.mm(x_TD[rows], weight_EHD[expert].t(), out=out_TH[rows])
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[Any, ...]:
        (x_TD,) = ctx.saved_tensors
        weight_EHD: torch.Tensor = ctx.weight
        counts: tuple[int, ...] = ctx.counts
        needs_x, needs_weight, _, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_x = x_TD.new_empty(x_TD.shape)
            for expert, rows in _row_ranges(counts):
                torch.mm(grad_TH[rows], weight_EHD[expert], out=grad_x[rows])
        if needs_weight:
            grad_weight = produce(
                ctx.holder,
                weight_EHD,
                lambda: _weight_gradient(x_TD, grad_TH, weight_EHD, counts),
            )
        return grad_x, grad_weight, None, None


def _weight_gradient(
    x_TD: torch.Tensor,
    grad_TH: torch.Tensor,
    weight_EHD: torch.Tensor,
    counts: tuple[int, ...],
) -> torch.Tensor:
    grad_EHD = torch.empty_like(weight_EHD, memory_format=torch.contiguous_format)
    for expert, count in enumerate(counts):
        if count == 0:
            grad_EHD[expert].zero_()
    for expert, rows in _row_ranges(counts):
        torch.mm(grad_TH[rows].t(), x_TD[rows], out=grad_EHD[expert])
    return grad_EHD


def _row_ranges(counts: tuple[int, ...]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has rows."""
    ranges = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            ranges.append((expert, slice(start, start + count)))
        start += count
    return ranges
