"""`ElbRouter`: top-k routing that keeps every expert equally busy.

Scores choose experts after a selection bias is added; gate weights come from the unbiased scores.
Forwards only count. Once a step, after the counts of all micro-batches and replicas were summed,
`balance` hands them to the pure `balancer` and takes over the new bias; so the routing of a micro-batch
is a function of its tokens and of the state at the start of the step.

Who trains: in a pipeline `deepopt.pipeline` sums and applies. In a loop of your own, call
`router.update()` before each `optimizer.step()`; with several processes, see its argument.

What is counted lies as `step_totals` says; which calls repeat others is `route_memory`'s to know.

Shapes: T tokens, D features, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from deepopt.config import ElbConfig
from deepopt.moe import balancer
from deepopt.moe.balance_losses import Routed, attach_losses, wants_losses
from deepopt.moe.balancer import BalancerState, StepCounts
from deepopt.moe.elb_config import elb_settings
from deepopt.moe.gate import Gate, check_arguments
from deepopt.moe.in_step import Feedback, select_in_chunks
from deepopt.moe.route_memory import RouteMemory
from deepopt.moe.state_buffers import (
    read_state,
    refuse_other_size,
    register_state,
    store_state,
)
from deepopt.moe.step_totals import (
    Totals,
    add_sample,
    add_stats,
    bad_scores,
    bad_tokens,
    loads_of,
    num_totals,
    read_totals,
    sample_rows,
)
from deepopt.moe.warmup import solve_bias
from deepopt_kernels.elb_select import elb_select


class ElbRouter(torch.nn.Module):
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

    expert_bias: torch.Tensor
    elb_histogram: torch.Tensor
    elb_origin: torch.Tensor
    elb_width: torch.Tensor
    elb_slope: torch.Tensor
    elb_load: torch.Tensor
    elb_drift: torch.Tensor
    elb_step: torch.Tensor

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
        super().__init__()
        check_arguments(
            num_experts=num_experts,
            top_k=top_k,
            noise=noise,
            score=score,
            num_groups=num_groups,
            top_groups=top_groups,
        )
        self.elb = elb_settings(options, what="ElbRouter")
        self.num_experts = num_experts
        self.top_k = top_k
        self.noise = noise
        self.gate = Gate(score=score, normalise=normalise, weight_scale=weight_scale)
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.init_std = init_std
        self.num_devices = self.elb.devices or 1
        self.loss_scale = 1.0
        self.keeps_routes = False
        self.weight = torch.nn.Parameter(torch.empty(num_experts, d_model))
        register_state(self, balancer.first_state(num_experts))
        self._counts: torch.Tensor | None = None  # int32 [num_counts]
        self._memory = RouteMemory()
        self._is_cold: bool | None = None  # no update yet; None: look
        self._is_unsettled: bool | None = None  # see `balancer.is_unsettled`; None: look
        self._gain_was_said = False
        self.reset_parameters()

    def configure(self, elb: ElbConfig, *, devices: int = 1) -> None:
        """Take the settings of a job.

        Args:
            elb: the section `elb`.
            devices: that share the experts, where the section does not say.
        """
        self.elb = elb
        self.num_devices = elb.devices or devices
        self._counts = None
        if not self.expert_bias.is_meta and int(self.elb_step) == 0:
            self.reset_state()
        self._look()

    def reset_parameters(self) -> None:
        """Initialise everything: the weight from the default generator, the state to nothing learned."""
        torch.nn.init.normal_(self.weight, std=self.init_std)
        self.reset_state()

    def take_pretrained_bias(self) -> None:
        """Take over the bias of a router that this one replaced; of itself it has none."""

    def reset_state(self) -> None:
        """Forget what was learned of loads and scores."""
        self._store(balancer.first_state(self.num_experts, unit=self._unit))

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

    # Once a step. --------------------------------------------------------------------------------

    @property
    def num_counts(self) -> int:
        """Length of the integers that a step counts."""
        return num_totals(self.num_experts, self._num_bins)

    def count_into(self, counts: torch.Tensor) -> None:
        """Count into somebody else's memory from now on.

        Args:
            counts: int32 [num_counts], on the router's device; whoever owns it sets it to 0.
        """
        assert counts.shape == (self.num_counts,), f"{tuple(counts.shape)}, {self.num_counts}"
        self._counts = counts

    def begin_step(self) -> None:
        """Forget micro-batches of the step before, and look at the state anew."""
        self._look()
        self._memory.begin_step()

    def begin_pass(self, key: Hashable) -> None:
        """Say what the next calls work on: a call for the same micro-batch is counted once, and where
        `keeps_routes` is set, routed once: the next pass with the key repeats the first one's choices.

        Args:
            key: of a micro-batch in this step.
        """
        self._memory.begin_pass(key)

    def discard_counts(self) -> None:
        """Forget what was counted since the last update: those forwards were not training."""
        if self._counts is not None:
            self._counts.zero_()
        self.begin_step()

    def balance(self, totals: Totals) -> None:
        """Update the state: exactly once a step, with the same totals wherever the layer is held.

        Args:
            totals: [num_counts] integers, summed over all micro-batches and replicas.
        """
        counts = self.read_counts(totals)
        state = balancer.update(self.state(), counts, elb=self.elb, top_k=self.top_k)
        self._store(state)
        self._memory.end_pass()

    def update(self, all_reduce: Callable[[torch.Tensor], object] | None = None) -> None:
        """The step's update in a loop of your own: call it before the optimizer's step.

        Args:
            all_reduce: sums an int32 tensor in place over the processes that hold copies, for example
                `torch.distributed.all_reduce`; None: there are none.

        Raises:
            TrainingError: scores were not finite; nothing was updated.
        """
        counts = self._own_counts()
        if all_reduce is not None:
            all_reduce(counts)
        totals = counts.cpu().numpy().copy()
        counts.zero_()
        self.begin_step()
        if num_bad := bad_tokens(totals):
            raise bad_scores(num_bad, where="the router")
        self.balance(totals)

    def read_counts(self, totals: Totals) -> StepCounts:
        """Totals as the balancer takes them."""
        return read_totals(totals, num_experts=self.num_experts, num_bins=self._num_bins)

    def state(self) -> BalancerState:
        """What the balancer remembers, in double precision."""
        return read_state(self)

    def gain_warning(self) -> str | None:
        """Once, when the seed's formula is told to overshoot: what to say."""
        if self.elb.mode != "formula" or self._gain_was_said:
            return None
        state = self.state()
        if state.step == 0 or state.step % self.elb.monitor_freq:
            return None
        gain = balancer.loop_gain(state, alpha=self.elb.alpha)
        if gain <= 1.0:
            return None
        self._gain_was_said = True
        return (
            f"elb.alpha {self.elb.alpha:g} gives a loop gain of {gain:.2f} with the scores' spread: above 1 "
            f"loads overshoot, above 2 they diverge; set elb.alpha to {self.elb.alpha / gain:.3f} or less"
        )

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
        """What biases are added to: log scores, up to a constant of each token; in the modes of others
        the scores themselves, as they define it."""
        if self.elb.mode in ("sign", "quantile"):
            return self.gate.scores(logits_TE)
        if self.elb.mode in ("elb", "formula"):
            return self.gate.log_scores(logits_TE)
        return logits_TE

    def _starts_cold(self) -> bool:
        if self._is_cold is None:
            self._look()
        return bool(self._is_cold)

    def _still_warms_up(self) -> bool:
        if self._is_unsettled is None:
            self._look()
        return bool(self._is_unsettled)

    def _look(self) -> None:
        """Read from the state what forwards depend on beside tensors: not inside a forward where that can
        be helped, for it waits for a device and stops compilers."""
        if self.expert_bias.is_meta:
            self._is_cold = self._is_unsettled = None
            return
        step = int(self.elb_step)
        drift = self.elb_drift.float().cpu().numpy()  # a bf16 model casts buffers, too
        self._is_cold = step == 0 and self.elb.warmup and self.elb.mode in ("elb", "quantile")
        self._is_unsettled = balancer.is_unsettled(drift, step=step, elb=self.elb)

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

    @property
    def _unit(self) -> float:
        """Size of the scores to choose by."""
        if self.elb.mode not in ("sign", "quantile"):
            return 1.0
        return 1.0 / self.num_experts if self.gate.score == "softmax" else 0.25

    @property
    def _num_bins(self) -> int:
        return balancer.NUM_BINS if balancer.needs_histogram(self.elb) else 0

    def _own_counts(self) -> torch.Tensor:
        if self._counts is None:
            self._counts = torch.zeros(
                self.num_counts, dtype=torch.int32, device=self.weight.device
            )
        return self._counts

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

    # State. --------------------------------------------------------------------------------------

    def _store(self, state: BalancerState) -> None:
        if not self.expert_bias.is_meta:
            store_state(self, state)
        self._look()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_other_size(state_dict, prefix, num_experts=self.num_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._look()
