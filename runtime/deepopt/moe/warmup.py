"""The bias that balances one small batch on its own: where training begins."""

from __future__ import annotations

import torch

ROUNDS = 12  # cutoffs and quantiles in turn; from no bias, even to a few percent after 8
_MOST_TOKENS = 2048  # of the batch that are looked at


def solve_bias(u_TE: torch.Tensor, *, top_k: int, rounds: int = ROUNDS) -> torch.Tensor:
    """Alternate between the tokens' cutoffs and the experts' quantiles.

    Args:
        u_TE: fp32 scores to choose by, finite.
        top_k: choices a token, below the number of experts.
        rounds: how often; few do where a bias that is nearly right is in the scores.

    Returns:
        [E] fp32 that sums to about 0; zeros where there are too few tokens to tell.

    Source: quantile balancing (J. Su, kexue.fm/archives/11619).
    """
    num_tokens, num_experts = u_TE.shape
    u_TE = u_TE[:: max(1, -(-num_tokens // _MOST_TOKENS))]
    num_tokens = u_TE.shape[0]
    bias_E = torch.zeros(num_experts, dtype=torch.float32, device=u_TE.device)
    # Each expert shall get the `wanted` tokens that need the least bias.
    wanted = round(num_tokens * top_k / num_experts)
    if not 1 <= wanted < num_tokens:
        return bias_E
    u_ET = u_TE.t().contiguous()  # an expert's needs lie side by side: three times as fast
    for _ in range(rounds):
        cutoff_T = (u_TE + bias_E).topk(top_k + 1, dim=-1).values[:, top_k]
        need_EW = (cutoff_T - u_ET).topk(wanted + 1, dim=1, largest=False).values
        bias_E = (need_EW[:, wanted - 1] + need_EW[:, wanted]) / 2
        bias_E = bias_E - bias_E.mean()
    return bias_E
