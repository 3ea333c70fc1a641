"""`ElbRouter`: top-k routing that keeps every expert equally busy.

Scores choose experts after a selection bias is added; gate weights come from the unbiased scores. Where the
bias comes from, and what a step's update does, is `learned_bias`'s.

Shapes: T tokens, D features, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from deepopt.moe import balancer
from deepopt.moe.balance_losses import Routed, attach_losses, wants_losses
from deepopt.moe.elb_config import elb_settings
from deepopt.moe.gate import Gate, check_arguments
from deepopt.moe.in_step import Feedback, select_in_chunks
from deepopt.moe.learned_bias import LearnedBias
from deepopt.moe.step_totals import add_sample, add_stats, loads_of, sample_rows
from deepopt.moe.warmup import solve_bias
from deepopt_kernels.elb_select import elb_select

# Of a logit, in units of the score, that mode `elb` chooses by beside the score. With less, loads are less
# even where scores saturate (3 times the usual spread); more gives up gate mass there (docs/elb.md).
LOGITS_SHARE = 0.5


class ElbRouter(LearnedBias):
    """The k experts with the highest biased scores.

    Args:
        d_model: features of a token.
        num_experts: experts to choose from.
        top_k: choices a token, at most `num_experts`.
        noise: standard deviation of the Gaussian noise on the logits in training; 0 for none. It also
            moves the gate weights.
        score: `softmax` over all experts, or `sigmoid` of each.
        normalise: make the k gate weights of a token sum to 1.
        weight_scale: multiplies the gate weights.
        num_groups: equal blocks of experts, for group-limited routing.
        top_groups: groups that a token's experts come from.
        init_std: standard deviation of the initial weights.
        options: keys of the section `elb` of a job: `mode`, `alpha`, `monitor_freq`, ...

    Attributes:
        loss_scale: what the main loss of a micro-batch is multiplied by before backward; whoever runs
            the backward sets it on every module that has it.

    Raises:
        InputError: an argument is out of range.
    """

    by_position = True  # wants to be called with `sequence_length`

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int,
        noise: float = 0.0,
        score: str = "softmax",
        normalise: bool = True,
        weight_scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        init_std: float = 0.02,
        **options: Any,
    ) -> None:
        check_arguments(
            num_experts=num_experts,
            top_k=top_k,
            noise=noise,
            score=score,
            num_groups=num_groups,
            top_groups=top_groups,
        )
        elb = elb_settings(options, what="ElbRouter")
        super().__init__(num_experts=num_experts, top_k=top_k, elb=elb)
        self.noise = noise
        self.gate = Gate(score=score, normalise=normalise, weight_scale=weight_scale)
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.init_std = init_std
        self.loss_scale = 1.0
        self.weight = torch.nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise everything: the weight from the default generator, the state to nothing learned."""
        torch.nn.init.normal_(self.weight, std=self.init_std)
        self.reset_state()

    def take_pretrained_bias(self) -> None:
        """Take over the bias of a router that this one replaced; of itself it has none."""

    def forward(
        self,
        x_TD: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        *,
        sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            x_TD: tokens, any floating dtype, sequence after sequence.
            padding_mask: [T] bool, True where a token is padding; padding is routed, but not counted
                and not balanced.
            sequence_length: tokens of a sequence; None: all are one.

        Returns:
            weights_TK fp32, ids_TK int64 with the best first, tokens_per_expert_E int64.
        """
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.training and self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        return self.route(logits_TE, padding_mask, sequence_length=sequence_length)

    def route(
        self,
        logits_TE: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        *,
        sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose experts by given logits; arguments and results as of `forward`."""
        counted_T = None if padding_mask is None else ~padding_mask.flatten()
        length = sequence_length or logits_TE.shape[0]
        key, again = self._memory.next_call()
        known = self._memory.take(key)
        if known is not None:
            ids_TK = known
            load_E = loads_of(ids_TK, counted_T, num_experts=self.num_experts)
        else:
            ids_TK, stats = self._select(logits_TE.detach(), counted_T, length)
            load_E = stats[-(self.num_experts + 2) : -2].long()
            if self.training and not again and not logits_TE.is_meta:
                self._count(logits_TE.detach(), ids_TK, stats, counted_T)
            if self.training and self.keeps_routes and key is not None:
                self._memory.keep(key, ids_TK)
        weights_TK = self.gate.weights(logits_TE, ids_TK)
        if self.training and weights_TK.requires_grad:
            weights_TK = self._attach_losses(weights_TK, logits_TE, load_E, counted_T, length)
        return weights_TK, ids_TK, load_E

    # Inside a forward. ---------------------------------------------------------------------------

    def _select(
        self, logits_TE: torch.Tensor, counted_T: torch.Tensor | None, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u_TE = self._choosing_scores(logits_TE)
        bias_E = self.expert_bias
        feedback = None
        if self.training:
            if not u_TE.is_meta and self._starts_cold():
                bias_E = self._warm(u_TE, counted_T)
            feedback = self._feedback(length)
        shape = {
            "top_k": self.top_k,
            "num_bins": self._num_bins if self.training else 0,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
        }
        if feedback is None or not u_TE.shape[0]:
            return elb_select(
                u_TE, bias_E, self.elb_origin, self.elb_width, counted_T=counted_T, **shape
            )
        return select_in_chunks(
            u_TE,
            bias_E,
            self.elb_origin,
            self.elb_width,
            counted_T=counted_T,
            sequence_length=length,
            feedback=feedback,
            **shape,
        )

    def _choosing_scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """What biases are added to: the scores, for of all choices with the same loads that gives up the
        least gate mass; log scores for the formula, which multiplies them."""
        if self._scale() == "scores":
            scores_TE = self.gate.scores(logits_TE)
            if self.elb.mode != "elb":
                return scores_TE
            # Scores that all but vanish, or are all but 1, are as good as equal: the bias alone would choose.
            return scores_TE.add_(logits_TE, alpha=LOGITS_SHARE * self._unit())
        return self.gate.log_scores(logits_TE) if self._scale() == "log scores" else logits_TE

    def _unit(self) -> float:
        if self._scale() != "scores":
            return 1.0
        return 1.0 / self.num_experts if self.gate.score == "softmax" else 0.25

    def _warm(self, u_TE: torch.Tensor, counted_T: torch.Tensor | None) -> torch.Tensor:
        if self.top_k >= self.num_experts or self.elb.target_share:
            return self.expert_bias
        own = u_TE if counted_T is None else u_TE[counted_T]
        own = own[own.isfinite().all(-1)]
        return self.expert_bias + solve_bias(own, top_k=self.top_k)

    def _feedback(self, length: int) -> Feedback | None:
        elb = self.elb
        if elb.mode != "elb" or elb.chunks == 1 or length < 2 or self.top_k >= self.num_experts:
            return None
        warms_up = self._still_warms_up()
        asked = elb.level == "expert" or self.num_devices > 1
        by_expert = elb.level == "expert" or warms_up
        devices = self.num_experts if by_expert else self.num_devices
        if devices == 1:
            return None
        blocks = balancer.device_blocks(self.num_experts, devices)
        if elb.target_share:
            shares = balancer.target_shares(self.state(), temper=elb.target_share)
            share_E = torch.from_numpy(shares).float().to(self.expert_bias.device)
        else:
            share_E = torch.full_like(self.expert_bias, 1.0 / self.num_experts)
        return Feedback(
            alpha=elb.alpha,
            chunks=elb.chunks,
            blocks=blocks,
            slope_E=self.elb_slope,
            share_E=share_E,
            solves=warms_up and not elb.target_share,
            doubles=warms_up and not elb.target_share and not asked,
        )

    def _attach_losses(
        self,
        weights_TK: torch.Tensor,
        logits_TE: torch.Tensor,
        load_E: torch.Tensor,
        counted_T: torch.Tensor | None,
        length: int,
    ) -> torch.Tensor:
        if not wants_losses(self.elb) or not len(logits_TE):
            return weights_TK
        # The whole batch's load of the last step: this step's is not known yet.
        known_E = torch.where(self.elb_load.any(), self.elb_load, load_E.float())
        routed = Routed(
            logits_TE=logits_TE,
            scores_TE=self.gate.scores(logits_TE),
            ids_TK=logits_TE.detach().topk(self.top_k, dim=-1).indices,
            load_E=known_E,
            counted_T=counted_T,
            sequence_length=length,
        )
        return attach_losses(weights_TK, routed, elb=self.elb, loss_scale=self.loss_scale)

    # Counting. -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(
        self,
        logits_TE: torch.Tensor,
        ids_TK: torch.Tensor,
        stats: torch.Tensor,
        counted_T: torch.Tensor | None,
    ) -> None:
        counts = self._own_counts()
        add_stats(counts, stats)
        rows = sample_rows(logits_TE.shape[0])
        sampled_T = None if counted_T is None else counted_T[rows]
        add_sample(counts, self.gate.scores(logits_TE[rows]), ids_TK[rows], sampled_T)
