"""A `BalancerState` as buffers of a module, so that checkpoints, moves and recovery carry it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from deepopt.errors import CheckpointError
from deepopt.moe.balancer import BalancerState

# By field of the state.
STATE_BUFFERS = {
    "bias": "expert_bias",
    "histogram": "elb_histogram",
    "origin": "elb_origin",
    "width": "elb_width",
    "slope": "elb_slope",
    "window": "elb_window",
    "load": "elb_load",
    "natural": "elb_natural",
    "drift": "elb_drift",
}
STEP_BUFFER = "elb_step"
SCALE_BUFFER = "elb_scale"
# What a bias was learned for, as the number in `SCALE_BUFFER`: added to anything else it means nothing.
SCALES = ("no bias", "log scores", "scores")


def register_state(module: torch.nn.Module, state: BalancerState) -> None:
    """Give a module the buffers that such a state needs, without values."""
    for field, name in STATE_BUFFERS.items():
        module.register_buffer(name, torch.empty(np.shape(getattr(state, field))))
    for name in (STEP_BUFFER, SCALE_BUFFER):
        module.register_buffer(name, torch.zeros((), dtype=torch.int64))


@torch.no_grad()
def store_state(module: torch.nn.Module, state: BalancerState, *, scale: str) -> None:
    """Write a state into the buffers, in fp32.

    Args:
        module: has the buffers.
        state: to write.
        scale: one of `SCALES`: what its bias is added to.
    """
    for field, name in STATE_BUFFERS.items():
        value = np.asarray(getattr(state, field), dtype=np.float32)
        module.get_buffer(name).copy_(torch.from_numpy(value))
    module.get_buffer(STEP_BUFFER).fill_(state.step)
    module.get_buffer(SCALE_BUFFER).fill_(SCALES.index(scale))


def read_state(module: torch.nn.Module) -> BalancerState:
    """The state in the buffers, in double precision."""
    arrays = {
        field: module.get_buffer(name).detach().cpu().numpy().astype(np.float64)
        for field, name in STATE_BUFFERS.items()
    }
    return BalancerState(step=int(module.get_buffer(STEP_BUFFER)), **arrays)


def scale_of(module: torch.nn.Module) -> str:
    """Which of `SCALES` the bias in the buffers was learned for."""
    return SCALES[int(module.get_buffer(SCALE_BUFFER))]


def refuse_unfit(state_dict: Mapping[str, Any], prefix: str, *, num_experts: int) -> None:
    """See that a state to be loaded is of as many experts, and says what its bias was learned for.

    Raises:
        CheckpointError: it is not, or does not.
    """
    name = f"{prefix}{STATE_BUFFERS['bias']}"
    found = state_dict.get(name)
    if found is not None and len(found) != num_experts:
        raise CheckpointError(
            f"{name} is the state of {len(found)} experts, this router has {num_experts}",
            remedy="load a checkpoint of the same number of experts, or leave the router's state out",
        )
    if found is not None and f"{prefix}{SCALE_BUFFER}" not in state_dict:
        raise CheckpointError(
            f"{name} does not say what it was learned for: {prefix}{SCALE_BUFFER} is missing",
            remedy=f"it was written before biases were added to the scores themselves; leave "
            f"{name} and {prefix}elb_* out, and the router learns anew",
        )
