"""What a router makes of logits beside its choice: scores and gate weights; and which arguments fit.

Shapes: T tokens, E experts, K choices a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deepopt.errors import InputError
from deepopt.moe.router import SCORES

_SMALLEST_SUM = 1e-20  # keeps the division finite when every chosen sigmoid underflows


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How gate weights come from logits.

    Args:
        score: `softmax` over all experts, or `sigmoid` of each.
        normalise: make the k gate weights of a token sum to 1.
        weight_scale: multiplies the gate weights.
    """

    score: str
    normalise: bool
    weight_scale: float

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E]."""
        return logits_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()

    def log_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, E], up to a constant of each token."""
        return F.logsigmoid(logits_TE) if self.score == "sigmoid" else logits_TE

    def weights(self, logits_TE: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] gate weights, from scores without bias."""
        if self.score == "softmax" and self.normalise:  # softmax over the k alone is the same
            weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
        elif self.score == "softmax":
            weights_TK = logits_TE.softmax(-1).gather(1, ids_TK)
        else:
            weights_TK = logits_TE.gather(1, ids_TK).sigmoid()
            if self.normalise:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(
                    _SMALLEST_SUM
                )
        return weights_TK if self.weight_scale == 1.0 else weights_TK * self.weight_scale


def check_arguments(
    *, num_experts: int, top_k: int, noise: float, score: str, num_groups: int, top_groups: int
) -> None:
    """See that the arguments of a router fit together.

    Raises:
        InputError: they do not; it names the values.
    """
    if not 1 <= top_k <= num_experts:
        raise InputError(
            f"a router cannot choose {top_k} of {num_experts} experts",
            remedy=f"set top_k between 1 and {num_experts}",
        )
    if score not in SCORES:
        raise InputError(
            f"router score {score!r} is unknown", remedy=f"choose one of {', '.join(SCORES)}"
        )
    if noise < 0:
        raise InputError(
            f"router noise {noise} must not be negative", remedy="set it to 0 to switch it off"
        )
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_groups <= num_groups:
        raise InputError(
            f"{num_experts} experts in {num_groups} groups, of which {top_groups} are taken, do not "
            "fit",
            remedy="set num_groups to a divisor of num_experts and top_groups between 1 and num_groups",
        )
    if top_k > num_experts // num_groups * top_groups:
        raise InputError(
            f"{top_groups} groups of {num_experts // num_groups} experts cannot give {top_k} choices",
            remedy="raise top_groups or lower top_k",
        )
