"""Feed-forward parts of a block: a dense SwiGLU, and shared plus routed experts.

Shapes: T tokens, D features, E experts, F hidden features of one expert, K choices a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deepopt.moe.dispatch import gather_from_experts, plan_dispatch, scatter_to_experts
from deepopt.moe.router import Router, RouterByPosition
from deepopt_kernels.grouped_linear import grouped_linear
from deepopt_kernels.weight_grad import WeightGradHolder


class SwiGLU(torch.nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one product.

    Args:
        d_model: features in and out.
        hidden: hidden features.

    Source: arXiv:2002.05202.
    """

    def __init__(self, d_model: int, *, hidden: int) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = torch.nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., D]."""
        out: torch.Tensor = self.down(_gated(self.gate_up(x)))
        return out

    def reset_parameters(self, *, std: float, residual_std: float) -> None:
        """Draw the weights from the default generator.

        Args:
            std: of the input projections.
            residual_std: of the projection that adds to the residual stream.
        """
        torch.nn.init.normal_(self.gate_up.weight, std=std)
        torch.nn.init.normal_(self.down.weight, std=residual_std)


class RoutedExperts(torch.nn.Module):
    """E SwiGLUs as two grouped products.

    Args:
        d_model: features in and out.
        num_experts: E.
        hidden: hidden features of one expert.

    Attributes:
        weight_grad_holder: set by `deepopt_kernels.weight_grad.defer_linears`.
    """

    def __init__(self, d_model: int, *, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight_grad_holder: WeightGradHolder | None = None
        self.gate_up_weight = torch.nn.Parameter(torch.empty(num_experts, 2 * hidden, d_model))
        self.down_weight = torch.nn.Parameter(torch.empty(num_experts, d_model, hidden))

    def forward(self, x_RD: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        """Run each expert over its rows.

        Args:
            x_RD: rows sorted by expert.
            counts: rows of each expert.

        Returns:
            [R, D], rows in the same order.
        """
        holder = self.weight_grad_holder
        hidden_RF = _gated(grouped_linear(x_RD, self.gate_up_weight, counts, holder=holder))
        return grouped_linear(hidden_RF, self.down_weight, counts, holder=holder)

    def reset_parameters(self, *, std: float, residual_std: float) -> None:
        """Draw the weights from the default generator.

        Args:
            std: of the input projections.
            residual_std: of the projection that adds to the residual stream.
        """
        torch.nn.init.normal_(self.gate_up_weight, std=std)
        torch.nn.init.normal_(self.down_weight, std=residual_std)


class MoeFeedForward(torch.nn.Module):
    """Shared experts see every token; routed ones see those that the router sends.

    Args:
        d_model: features in and out.
        router: chooses the routed experts; an `nn.Module`, see `deepopt.moe.router`.
        num_experts: routed experts.
        num_shared_experts: may be 0; they are one SwiGLU of so many times the width.
        hidden: hidden features of one expert.

    Source: arXiv:2401.06066 (DeepSeekMoE), section 3.
    """

    def __init__(
        self,
        d_model: int,
        *,
        router: Router,
        num_experts: int,
        num_shared_experts: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = RoutedExperts(d_model, num_experts=num_experts, hidden=hidden)
        self.shared = (
            SwiGLU(d_model, hidden=num_shared_experts * hidden) if num_shared_experts else None
        )

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] to [B, S, D]."""
        x_TD = x_BSD.flatten(0, -2)
        router = self.router
        if isinstance(router, RouterByPosition):
            weights_TK, ids_TK, _ = router(x_TD, sequence_length=x_BSD.shape[-2])
        else:
            weights_TK, ids_TK, _ = router(x_TD)
        dispatch = plan_dispatch(ids_TK, num_experts=self.experts.down_weight.shape[0])
        rows_RD = self.experts(scatter_to_experts(x_TD, dispatch), dispatch.counts)
        out_TD = gather_from_experts(rows_RD, weights_TK, dispatch)
        if self.shared is not None:
            out_TD = out_TD + self.shared(x_TD)
        return out_TD.view_as(x_BSD)

    def reset_parameters(self, *, std: float, residual_std: float) -> None:
        """Draw the weights from the default generator.

        Args:
            std: of the input projections.
            residual_std: of the projections that add to the residual stream.
        """
        self.router.reset_parameters()
        self.experts.reset_parameters(std=std, residual_std=residual_std)
        if self.shared is not None:
            self.shared.reset_parameters(std=std, residual_std=residual_std)


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
