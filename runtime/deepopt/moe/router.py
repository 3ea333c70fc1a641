"""Which experts a token goes to: a plain router, and what any other must offer.

A router is a module made as `Class(d_model, num_experts=..., top_k=..., noise=..., **router_kwargs)`,
with `auxiliary_coefficient=` where the model was given one, and called as `router(x_TD, padding_mask)`;
one with an attribute `by_position` is also told the `sequence_length`. It routes; it does not move
tokens (`dispatch` does).

Shapes: T tokens, D features, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from deepopt.errors import InputError
from deepopt.moe.auxiliary_loss import attach_loss, switch_balance_loss

SCORES = ("softmax", "sigmoid")

_SMALLEST_SUM = 1e-20  # keeps the division finite when every chosen sigmoid underflows


class Router(Protocol):
    """What the model asks of a router; it must be an `nn.Module`."""

    def __call__(
        self, x_TD: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            x_TD: tokens, any floating dtype.
            padding_mask: [T] bool, True where a token is padding.

        Returns:
            weights_TK fp32, ids_TK int64, tokens_per_expert_E int64 without padding.
        """
        ...

    def reset_parameters(self) -> None:
        """Initialise everything from the default generator."""
        ...


@runtime_checkable
class RouterByPosition(Protocol):
    """A router that is also told how long a sequence is."""

    by_position: bool

    def __call__(
        self,
        x_TD: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        *,
        sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of `Router`; T is a multiple of `sequence_length`."""
        ...


class TopKRouter(torch.nn.Module):
    """The k experts with the highest scores; gate weights are their scores, normalised over the
    k.

    Scores are fp32 whatever the model computes in. Of equal scores the lower expert index wins.

    Args:
        d_model: features of a token.
        num_experts: experts to choose from.
        top_k: choices a token, at most `num_experts`.
        noise: standard deviation of the Gaussian noise on the logits in training; 0 for none.
            It also moves the gate weights.
        auxiliary_coefficient: weight of the load-balancing loss, 0 for none. It is a mean over
            the micro-batch and does not show in the reported loss.
        score: `softmax` over all experts, or `sigmoid` of each.
        init_std: standard deviation of the initial weights.

    Attributes:
        loss_scale: what the main loss of a micro-batch is multiplied by before backward;
            whoever runs the backward sets it on every module that has it.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        noise: float = 0.0,
        auxiliary_coefficient: float = 0.01,
        score: str = "softmax",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise InputError(
                f"a router cannot choose {top_k} of {num_experts} experts",
                remedy=f"set top_k between 1 and {num_experts}",
            )
        if score not in SCORES:
            raise InputError(
                f"router score {score!r} is unknown",
                remedy=f"choose one of {', '.join(SCORES)}",
            )
        if noise < 0 or auxiliary_coefficient < 0:
            raise InputError(
                f"router noise {noise} and auxiliary_coefficient {auxiliary_coefficient} "
                "must not be negative",
                remedy="set them to 0 to switch them off",
            )
        self.num_experts = num_experts
        self.top_k = top_k
        self.noise = noise
        self.auxiliary_coefficient = auxiliary_coefficient
        self.score = score
        self.init_std = init_std
        self.loss_scale = 1.0
        self.weight = torch.nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise everything from the default generator."""
        torch.nn.init.normal_(self.weight, std=self.init_std)

    def forward(
        self, x_TD: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            x_TD: tokens, any floating dtype.
            padding_mask: [T] bool, True where a token is padding; padding is routed, but not
                counted and not balanced.

        Returns:
            weights_TK fp32 that sum to 1, ids_TK int64 with the best first, tokens_per_expert_E
            int64.
        """
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.training and self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        scores_TE = logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        # topk leaves the order of equal values open; a stable sort of the logits does not.
        ids_TK = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        ids_TK = ids_TK[:, : self.top_k].contiguous()
        chosen_TK = scores_TE.gather(1, ids_TK)
        weights_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp_min(_SMALLEST_SUM)
        counted_TK = ids_TK if padding_mask is None else ids_TK[~padding_mask]
        tokens_per_expert_E = torch.bincount(counted_TK.flatten(), minlength=self.num_experts)
        if self.training and self.auxiliary_coefficient and weights_TK.requires_grad:
            loss = switch_balance_loss(
                self._shares(scores_TE, padding_mask), tokens_per_expert_E, counted_TK.numel()
            )
            scale = self.auxiliary_coefficient * self.loss_scale
            weights_TK = attach_loss(weights_TK, loss, scale=scale)
        return weights_TK, ids_TK, tokens_per_expert_E

    def _shares(
        self, scores_TE: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores of the tokens that count, as shares that sum to 1."""
        if padding_mask is not None:
            scores_TE = scores_TE[~padding_mask]
        if self.score == "softmax":
            return scores_TE
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(_SMALLEST_SUM)
