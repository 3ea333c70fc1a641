"""Choose experts by biased scores and count, in the same pass, what the balancer learns from.

One operation: biased top-k, the loads, and a histogram of how much bias each expert would have
needed for each token. The PyTorch reference here defines it; on CUDA tensors the Triton kernel of
`elb_select_triton` is taken. It does not decide biases (`deepopt.moe.balancer` does) and no
gradient passes through it.

Shapes: T tokens, E experts, K choices a token, B bins, G groups of experts.
"""

from __future__ import annotations

import torch

# Half of the bins lie within NEAR bin widths of an expert's origin; farther ones grow wider.
NEAR = 32.0


def num_stats(num_experts: int, num_bins: int) -> int:
    """Length of the counts that `elb_select` returns."""
    return num_experts * num_bins + num_experts + 2


def elb_select(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    *,
    top_k: int,
    num_bins: int,
    counted_T: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts with the highest `u + bias`; of equal ones the lower index wins.

    A token's cutoff is its (k+1)-th highest biased score. Expert i would have been chosen with a
    bias above `need = cutoff - u_i`; bin `floor((1 + z / (NEAR + |z|)) / 2 x B)` of
    `z = (need - origin_i) / width_i` counts it.

    Args:
        u_TE: fp32 scores to choose by.
        bias_E: fp32, added for the choice.
        origin_E: fp32 centre of each expert's histogram.
        width_E: fp32 width of its bins at the centre, above 0.
        top_k: K, at most E.
        num_bins: B, even; 0: no histogram. With K = E there is no cutoff and the histogram is 0.
        counted_T: bool, the tokens that count; None: all. Others are routed all the same.
        num_groups: G equal blocks of experts.
        top_groups: a token's experts come from so many groups, those with the highest sum of their
            two best biased scores; G: no limit.

    Returns:
        ids_TK int64, the best first; and int32 counts, flat: the histogram [E x B], the load of each
        expert [E], the tokens that count, the tokens that do not because their scores are not
        finite.
    """
    ids, stats = torch.ops.deepopt.elb_select(
        u_TE,
        bias_E,
        origin_E,
        width_E,
        counted_T,
        top_k,
        num_bins,
        num_groups,
        top_groups,
    )
    return ids, stats


def elb_select_reference(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    top_k: int,
    num_bins: int,
    num_groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `elb_select`, in PyTorch."""
    num_experts = u_TE.shape[1]
    stats = torch.zeros(num_stats(num_experts, num_bins), dtype=torch.int32, device=u_TE.device)
    if u_TE.shape[0] == 0:
        return torch.empty(0, top_k, dtype=torch.int64, device=u_TE.device), stats
    v_TE = u_TE + bias_E
    if top_groups < num_groups:
        v_TE = _within_groups(v_TE, num_groups, top_groups)
    values, ids = _ordered_top(v_TE, min(top_k + 1, num_experts))
    fine_T = values[:, 0].isfinite()  # NaN and +inf come first in topk
    counts_T = fine_T if counted_T is None else fine_T & counted_T
    ids_TK = ids[:, :top_k].contiguous()
    everything = bool(counts_T.all())
    loads_E = torch.bincount(
        (ids_TK if everything else ids_TK[counts_T]).flatten(), minlength=num_experts
    )
    if num_bins and top_k < num_experts:
        cutoff_T = values[:, top_k]
        if not everything:
            u_TE, cutoff_T = u_TE[counts_T], cutoff_T[counts_T]
        stats[: num_experts * num_bins] = _histogram(
            u_TE, cutoff_T, origin_E, width_E, num_bins
        )
    rest = stats[num_experts * num_bins :]
    rest[:num_experts] = loads_E
    rest[num_experts] = counts_T.sum()
    wanted = fine_T.logical_not() if counted_T is None else counted_T & ~fine_T
    rest[num_experts + 1] = wanted.sum()
    return ids_TK, stats


def _ordered_top(v_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk, with the lower index first among equal values: topk leaves that open.

    The last place is asked for its value alone: which of its equals stands there may be open.
    """
    values, ids = v_TE.topk(k, dim=-1)
    tied_T = (values[:, 1:] == values[:, :-1]).any(-1)
    if tied_T.any():
        rows = v_TE[tied_T].sort(dim=-1, descending=True, stable=True)
        values[tied_T], ids[tied_T] = rows.values[:, :k], rows.indices[:, :k]
    return values, ids


def _within_groups(v_TE: torch.Tensor, num_groups: int, top_groups: int) -> torch.Tensor:
    """Experts of other groups than the best ones get -inf."""
    v_TGn = v_TE.view(v_TE.shape[0], num_groups, -1)
    score_TG = v_TGn.topk(min(2, v_TGn.shape[-1]), dim=-1).values.sum(-1)
    order_TG = score_TG.sort(dim=-1, descending=True, stable=True).indices
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, order_TG[:, :top_groups], True)
    return v_TGn.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).view_as(v_TE)


def _histogram(
    u_TE: torch.Tensor,
    cutoff_T: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    num_bins: int,
) -> torch.Tensor:
    """Flat [E x B]; no transcendental function, so that every device finds the same bins."""
    z_TE = cutoff_T.unsqueeze(-1) - u_TE
    z_TE.sub_(origin_E).div_(width_E)
    far_TE = z_TE.abs().add_(NEAR)
    z_TE.div_(far_TE).add_(1.0).mul_(num_bins / 2)
    bins_TE = z_TE.nan_to_num_(num_bins - 1).clamp_(0, num_bins - 1).int()
    experts = torch.arange(u_TE.shape[1], dtype=torch.int32, device=u_TE.device)
    bins_TE.add_(experts * num_bins)
    return torch.bincount(bins_TE.flatten(), minlength=u_TE.shape[1] * num_bins)


def _on_cuda(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    top_k: int,
    num_bins: int,
    num_groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from deepopt_kernels.elb_select_triton import elb_select_triton

    if top_groups < num_groups:  # the mask is a pass of its own there
        return elb_select_reference(
            u_TE,
            bias_E,
            origin_E,
            width_E,
            counted_T,
            top_k,
            num_bins,
            num_groups,
            top_groups,
        )
    return elb_select_triton(
        u_TE, bias_E, origin_E, width_E, counted_T, top_k=top_k, num_bins=num_bins
    )


def _without_memory(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    top_k: int,
    num_bins: int,
    num_groups: int,
    top_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    length = num_stats(u_TE.shape[1], num_bins)
    return (
        u_TE.new_empty(u_TE.shape[0], top_k, dtype=torch.int64),
        u_TE.new_empty(length, dtype=torch.int32),
    )


# A `custom_op` would import torch's compiler into every process at the first call.
_library = torch.library.Library("deepopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "elb_select(Tensor u, Tensor bias, Tensor origin, Tensor width, Tensor? counted, "
    "int top_k, int num_bins, int num_groups, int top_groups) -> (Tensor, Tensor)"
)
_library.impl("elb_select", elb_select_reference, "CPU")  # type: ignore[no-untyped-call]
_library.impl("elb_select", _on_cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("elb_select", _without_memory, "Meta")  # type: ignore[no-untyped-call]
