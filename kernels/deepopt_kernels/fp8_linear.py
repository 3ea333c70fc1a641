"""A linear map whose three products are computed in FP8, and the module in the place of `nn.Linear`.

    y_TN  = x_TK . W_NK            x in tiles along K, W in blocks
    gx_TK = g_TN . W_NK            g in tiles along N, the same blocks of W
    gW_NK = g_TN . x_TK            both in tiles along T

Each of x, g and W is quantised from its own values whenever it is needed, so a forward that runs again
gives the same bits. Between forward and backward only x in tiles along T is held: one byte a value and
a scale each 128. Weights, their gradients and the bias keep their type; the bias is added in fp32
before the result is rounded, and its gradient is a plain sum.

The products come from `fp8_scaled_mm.product`, the quantised matrices from `fp8_format`: those are the
two places where a faster kernel goes.

Shapes: T tokens, K input features, N output features.
Source: arXiv:2412.19437 (DeepSeek-V3), section 3.3: E4M3 in all three products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepopt_kernels.fp8_format import Quantised, quantise_activation, quantise_blocks
from deepopt_kernels.fp8_scaled_mm import product
from deepopt_kernels.weight_grad import WeightGradHolder, produce


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    holder: WeightGradHolder | None = None,
) -> torch.Tensor:
    """`F.linear` in FP8, with gradients; the weight gradient can wait.

    Args:
        x: [..., K], of the weight's dtype; under autocast of any.
        weight: [N, K].
        bias: [N].
        holder: asked in backward for a capturing queue; None computes everything at once.

    Returns:
        [..., N] of the dtype that `F.linear` would give.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: want the same")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}: "
            "want [..., K] and [N, K]"
        )
    rows = x.reshape(-1, x.shape[-1])
    out: torch.Tensor
    if torch.is_grad_enabled():
        out = _Fp8Linear.apply(rows, weight, bias, holder)  # type: ignore[no-untyped-call]
    else:
        row_tiles, _ = quantise_activation(rows, transposed=False)
        out = _forward(row_tiles, weight, bias, out_dtype=x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


class Fp8Linear(torch.nn.Linear):
    """`nn.Linear` that computes in FP8; made from one by `to_fp8`.

    Attributes:
        weight_grad_holder: set by `deepopt_kernels.weight_grad.defer_linears`.
    """

    weight_grad_holder: WeightGradHolder | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return fp8_linear(input, self.weight, self.bias, holder=self.weight_grad_holder)


def to_fp8(linear: torch.nn.Linear) -> Fp8Linear:
    """Let an `nn.Linear` compute in FP8 from now on: the same object, parameters, names and hooks.

    Args:
        linear: exactly an `nn.Linear`; a subclass may have another forward.
    """
    assert type(linear) is torch.nn.Linear, f"to_fp8() got a {type(linear).__name__}"
    linear.__class__ = Fp8Linear
    assert isinstance(linear, Fp8Linear)
    return linear


def from_fp8(linear: Fp8Linear) -> torch.nn.Linear:
    """Undo `to_fp8`: the same object computes as an `nn.Linear` again.

    Args:
        linear: of any type of weight.
    """
    plain: torch.nn.Linear = linear
    plain.__class__ = torch.nn.Linear
    return plain


def _forward(
    row_tiles: Quantised,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    blocks = quantise_blocks(weight)
    if bias is None:
        return product(row_tiles, blocks, out_dtype=out_dtype)
    return product(row_tiles, blocks, out_dtype=torch.float32).add_(bias).to(out_dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: torch.Tensor,
        weight_NK: torch.Tensor,
        bias_N: torch.Tensor | None,
        holder: WeightGradHolder | None,
    ) -> torch.Tensor:
        row_tiles, column_tiles = quantise_activation(x_TK, transposed=ctx.needs_input_grad[1])
        if column_tiles is not None:
            ctx.save_for_backward(column_tiles.codes, column_tiles.scale)
        ctx.weight = weight_NK  # on the node, as in `weight_grad`
        ctx.holder = holder
        ctx.x_dtype = x_TK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return _forward(row_tiles, weight_NK, bias_N, out_dtype=x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: torch.Tensor) -> tuple[Any, ...]:
        weight: torch.Tensor = ctx.weight
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        row_tiles, column_tiles = quantise_activation(grad_TN, transposed=needs_weight)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            blocks = quantise_blocks(weight).transposed()
            grad_x = product(row_tiles, blocks, out_dtype=ctx.x_dtype)
        if column_tiles is not None:
            codes, scale = ctx.saved_tensors
            grad_columns, x_columns = column_tiles, Quantised(codes, scale, 1)
            grad_weight = produce(
                ctx.holder,
                weight,
                lambda: product(grad_columns, x_columns, out_dtype=weight.dtype),
            )
        if needs_bias:
            # Contiguous: the order of additions is one of memory.
            grad_bias = grad_TN.contiguous().sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None
