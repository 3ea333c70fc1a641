"""One routing bias an expert, as state of a module: what is counted, remembered and updated once a step.

Forwards only count. Once a step, after the counts of all micro-batches and replicas were summed,
`balance` hands them to the pure `balancer` and takes over the new bias; so the routing of a micro-batch
is a function of its tokens and of the state at the start of the step. Does not route (`elb_router` does).

Who trains: in a pipeline `deepopt.pipeline` sums and applies. In a loop of your own, call `update()` before
each `optimizer.step()`; with several processes, see its argument.

What is counted lies as `step_totals` says; which calls repeat others is `route_memory`'s to know.

Shapes: E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from deepopt.config import ElbConfig
from deepopt.moe import balancer
from deepopt.moe.balancer import BalancerState, StepCounts
from deepopt.moe.route_memory import RouteMemory
from deepopt.moe.state_buffers import (
    read_state,
    refuse_unfit,
    register_state,
    scale_of,
    store_state,
)
from deepopt.moe.step_totals import Totals, bad_scores, bad_tokens, num_totals, read_totals

logger = logging.getLogger(__name__)


class LearnedBias(torch.nn.Module):
    """A module whose forwards choose experts with a bias, and count for the next one.

    Args:
        num_experts: E.
        top_k: choices a token.
        elb: how the bias is learned.

    Attributes:
        keeps_routes: whether choices are kept for a pass that repeats a micro-batch.
    """

    expert_bias: torch.Tensor
    elb_histogram: torch.Tensor
    elb_origin: torch.Tensor
    elb_width: torch.Tensor
    elb_slope: torch.Tensor
    elb_load: torch.Tensor
    elb_drift: torch.Tensor
    elb_step: torch.Tensor
    elb_scale: torch.Tensor

    def __init__(self, *, num_experts: int, top_k: int, elb: ElbConfig) -> None:
        super().__init__()
        self.elb = elb
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_devices = elb.devices or 1
        self.keeps_routes = False
        register_state(self, balancer.first_state(num_experts))
        self._counts: torch.Tensor | None = None  # int32 [num_counts]
        self._memory = RouteMemory()
        self._is_cold: bool | None = None  # no update yet; None: look
        self._is_unsettled: bool | None = None  # see `balancer.is_unsettled`; None: look
        self._gain_was_said = False

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

    def reset_state(self) -> None:
        """Forget what was learned of loads and scores."""
        self._store(balancer.first_state(self.num_experts, unit=self._unit()))

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

    def warms_up(self) -> bool:
        """Whether forwards of this step solve for a bias of their own, which takes longer: in step 1, and
        while scores outrun the bias of the step before."""
        return self._starts_cold() or self._still_warms_up()

    def hold_warm_up(self) -> bool:
        """Route as in the warm-up until the next update, whatever the state says: for trials.

        Returns:
            Whether the settings have a warm-up; nothing happens where they have none.
        """
        has_one = self.elb.warmup and self.elb.mode == "elb"
        if has_one:
            self._is_cold, self._is_unsettled = False, True
        return has_one

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

    # For forwards. -------------------------------------------------------------------------------

    def _scale(self) -> str:
        """What the bias is added to, one of `state_buffers.SCALES`."""
        if self.elb.mode in ("aux", "none"):
            return "no bias"
        return "log scores" if self.elb.mode == "formula" else "scores"

    def _unit(self) -> float:
        """Size of what the bias is added to; log scores have 1."""
        return 1.0

    def _starts_cold(self) -> bool:
        if self._is_cold is None:
            self._look()
        return bool(self._is_cold)

    def _still_warms_up(self) -> bool:
        if self._is_unsettled is None:
            self._look()
        return bool(self._is_unsettled)

    def _look(self) -> None:
        """Read from the state what forwards depend on beside tensors, and forget a bias that was learned for
        something else: not inside a forward where that can be helped, for it waits for a device and stops
        compilers."""
        if self.expert_bias.is_meta:
            self._is_cold = self._is_unsettled = None
            return
        step = int(self.elb_step)
        if step and (found := scale_of(self)) != self._scale():
            logger.warning(
                "a router's bias was learned for %s, mode %s adds to %s: it is forgotten and learned anew",
                found,
                self.elb.mode,
                self._scale(),
            )
            self.reset_state()
            return
        drift = self.elb_drift.float().cpu().numpy()  # a bf16 model casts buffers, too
        self._is_cold = step == 0 and self.elb.warmup and self.elb.mode in ("elb", "quantile")
        self._is_unsettled = balancer.is_unsettled(drift, step=step, elb=self.elb)

    @property
    def _num_bins(self) -> int:
        return balancer.NUM_BINS if balancer.needs_histogram(self.elb) else 0

    def _own_counts(self) -> torch.Tensor:
        if self._counts is None:
            self._counts = torch.zeros(
                self.num_counts, dtype=torch.int32, device=self.expert_bias.device
            )
        return self._counts

    def _store(self, state: BalancerState) -> None:
        if not self.expert_bias.is_meta:
            store_state(self, state, scale=self._scale())
        self._look()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_unfit(state_dict, prefix, num_experts=self.num_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._look()
