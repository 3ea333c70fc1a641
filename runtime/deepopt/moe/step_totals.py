"""The integers that a router counts in a step, flat: what lies where, and what samples add.

    histogram [E x B] | loads [E] | natural loads [E] | gate masses [2] | tokens | those of no finite score

Sums of them are exact in any order. Does not choose experts (`deepopt_kernels.elb_select` counts the first
two and the last two while it does).

Shapes: T tokens, E experts, K choices a token, B bins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from deepopt.errors import TrainingError
from deepopt.moe.balancer import StepCounts

_SAMPLED_TOKENS = 64  # of a micro-batch, whose routing without bias is compared
_MASS_UNIT = 4096  # gate mass is counted in integers of 1/4096, so that sums are exact
_NUM_MASSES = 2

Totals = np.ndarray[Any, np.dtype[Any]]


def num_totals(num_experts: int, num_bins: int) -> int:
    """Length of the counts.

    Args:
        num_experts: E.
        num_bins: B; 0 without a histogram.
    """
    return num_experts * (num_bins + 2) + _NUM_MASSES + 2


def add_stats(counts: torch.Tensor, stats: torch.Tensor) -> None:
    """Add what `elb_select` counted.

    Args:
        counts: int32 [num_totals], changed in place.
        stats: of the choice.
    """
    counts[: len(stats) - 2] += stats[:-2]
    counts[-2:] += stats[-2:]


def sample_rows(num_tokens: int) -> slice:
    """The tokens of a micro-batch that are looked at for `add_sample`."""
    return slice(None, None, max(1, -(-num_tokens // _SAMPLED_TOKENS)))


def add_sample(
    counts: torch.Tensor,
    scores_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    counted_T: torch.Tensor | None,
) -> None:
    """Add the choices that some tokens would have had without bias, and the gate mass of both.

    Args:
        counts: int32 [num_totals], changed in place.
        scores_TE: of the sampled tokens.
        ids_TK: their choices.
        counted_T: bool, those that count; None: all.
    """
    num_experts = scores_TE.shape[1]
    best_TK = scores_TE.topk(ids_TK.shape[1], dim=-1).indices
    tail = counts[-num_experts - _NUM_MASSES - 2 : -2]
    tail[:num_experts] += loads_of(best_TK, counted_T, num_experts=num_experts)
    for position, ids in enumerate((best_TK, ids_TK)):
        mass_TK = scores_TE.gather(1, ids).nan_to_num(0.0)
        if counted_T is not None:
            mass_TK = mass_TK * counted_T.unsqueeze(-1)
        tail[num_experts + position] += (mass_TK.sum() * _MASS_UNIT).round().int()


def loads_of(
    ids_TK: torch.Tensor, counted_T: torch.Tensor | None, *, num_experts: int
) -> torch.Tensor:
    """[E] int64 choices of each expert. No bincount: its shape stops compilers.

    Args:
        ids_TK: choices.
        counted_T: bool, the tokens that count; None: all.
        num_experts: E.
    """
    ones_TK = torch.ones_like(ids_TK)
    if counted_T is not None:
        ones_TK = ones_TK * counted_T.unsqueeze(-1)
    return ids_TK.new_zeros(num_experts).scatter_add_(0, ids_TK.flatten(), ones_TK.flatten())


def read_totals(totals: Totals, *, num_experts: int, num_bins: int) -> StepCounts:
    """Totals as the balancer takes them; arguments as of `num_totals`."""
    e, b = num_experts, num_bins
    totals = totals.astype(np.int64)
    return StepCounts(
        histogram=totals[: e * b].reshape(e, b),
        load=totals[e * b : e * (b + 1)],
        natural=totals[e * (b + 1) : e * (b + 2)],
    )


def gate_masses(totals: Totals) -> tuple[float, float]:
    """Score mass of the sampled tokens that top-k without bias, and that the router, has chosen."""
    return float(totals[-4]) / _MASS_UNIT, float(totals[-3]) / _MASS_UNIT


def bad_tokens(totals: Totals) -> int:
    """Tokens whose scores are not finite."""
    return int(totals[-1])


def bad_scores(num_tokens: int, *, where: str) -> TrainingError:
    """The error of scores that are not finite."""
    return TrainingError(
        f"{where} got scores that are not finite for {num_tokens} tokens; the update was not applied",
        remedy="lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or resume from a "
        "checkpoint before this step",
    )
