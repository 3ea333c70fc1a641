"""Give the routers of a model, whoever wrote it, the settings of a job.

Routers of this package take them. Where a mixture of experts is routed by something else, it is found by
its structure and gets an `ElbRouter` in place, under the same names in the `state_dict`: a child `gate`
with a weight of one row an expert, a number `top_k`, and a child `experts` with weights of one matrix an
expert, where calling the gate gives (logits, gate weights, ids). So are built the models of `transformers`
since version 5: Mixtral, Qwen-MoE, DeepSeek-V3 and their kin.

Shapes: T tokens, D features, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deepopt.config import ElbConfig
from deepopt.errors import InputError
from deepopt.moe.elb_router import ElbRouter

_PRETRAINED_BIAS = "e_score_correction_bias"


def configure_routers(model: torch.nn.Module, elb: ElbConfig, *, devices: int = 1) -> int:
    """Configure every router of a model, and with `replace_routers` replace other people's; with mode
    `none` those stay as they are.

    Args:
        model: changed in place.
        elb: the settings.
        devices: that share the experts of a layer.

    Returns:
        How many `ElbRouter`s the model has now.

    Raises:
        InputError: a mixture of experts looks replaceable, but what its gate gives is not understood.
    """
    if elb.replace_routers and elb.mode != "none":
        for path, block in list(model.named_modules()):
            gate = getattr(block, "gate", None)
            if isinstance(gate, torch.nn.Module) and _is_replaceable(block, gate):
                rule = find_rule(gate, path=f"{path}.gate" if path else "gate")
                block.gate = ReplacedGate(gate, rule=rule)
    routers = [module for module in model.modules() if isinstance(module, ElbRouter)]
    for router in routers:
        router.configure(elb, devices=devices)
        router.take_pretrained_bias()
    return len(routers)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRule:
    """How a gate makes weights of logits.

    Args:
        score: `softmax` or `sigmoid`.
        normalise: whether a token's weights are divided by their sum.
        weight_scale: what they are multiplied by.
        computes_fp32: whether logits are computed in fp32 whatever the model's type.
        rounds_weights: whether weights get the model's type.
        num_groups: groups of experts.
        top_groups: of which so many are taken.
    """

    score: str
    normalise: bool
    weight_scale: float
    computes_fp32: bool
    rounds_weights: bool
    num_groups: int
    top_groups: int


def find_rule(gate: torch.nn.Module, *, path: str) -> GateRule:
    """Find out how a gate makes weights, by calling a copy of it on random tokens.

    Args:
        gate: with a `weight` and a `top_k`; may be on the meta device.
        path: how errors call it.

    Raises:
        InputError: what it gives is not understood.
    """
    weight = gate.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    copied = _plain_copy(gate)
    copied.weight = torch.nn.Parameter(torch.randn(weight.shape, generator=generator) / 4)
    x_TD = torch.randn(16, weight.shape[1], generator=generator)
    try:
        with torch.no_grad():
            logits, weights, ids = copied(x_TD)
            low_logits, low_weights, _ = copied.to(torch.bfloat16)(x_TD.to(torch.bfloat16))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _not_understood(path, f"{type(error).__name__}: {error}") from error
    top_k = int(getattr(gate, "top_k"))  # noqa: B009 - no attribute of Module
    if logits.shape != (16, weight.shape[0]) or ids.shape != (16, top_k):
        raise _not_understood(path, f"logits {list(logits.shape)}, ids {list(ids.shape)}")
    groups = getattr(gate, "num_group", None) or 1
    for score, normalise in itertools.product(("softmax", "sigmoid"), (True, False)):
        scores = logits.float().softmax(-1) if score == "softmax" else logits.float().sigmoid()
        expected = scores.gather(1, ids)
        if normalise:
            expected = expected / expected.sum(-1, keepdim=True)
        scale = float((weights / expected).median())
        if torch.allclose(weights.float(), expected * scale, rtol=1e-4, atol=0):
            return GateRule(
                score=score,
                normalise=normalise,
                weight_scale=1.0 if abs(scale - 1) < 1e-5 else round(scale, 6),
                computes_fp32=low_logits.dtype == torch.float32,
                rounds_weights=low_weights.dtype == torch.bfloat16,
                num_groups=groups,
                top_groups=getattr(gate, "topk_group", None) or groups,
            )
    raise _not_understood(path, "its weights are no softmax or sigmoid of its logits")


class ReplacedGate(ElbRouter):
    """An `ElbRouter` in the place of a gate that gave (logits, gate weights, ids).

    Args:
        gate: whose weight and other tensors are taken over.
        rule: how it made weights.
    """

    def __init__(self, gate: torch.nn.Module, *, rule: GateRule) -> None:
        weight = gate.get_parameter("weight")
        with torch.device("meta"):  # its own weight is not needed
            super().__init__(
                weight.shape[1],
                num_experts=weight.shape[0],
                top_k=int(getattr(gate, "top_k")),  # noqa: B009 - no attribute of Module
                score=rule.score,
                normalise=rule.normalise,
                weight_scale=rule.weight_scale,
                num_groups=rule.num_groups,
                top_groups=rule.top_groups,
            )
        self.weight = weight
        for name, buffer in list(self.named_buffers(recurse=False)):
            self.register_buffer(name, torch.empty_like(buffer, device=weight.device))
        self.reset_state()
        self._rule = rule
        for name, buffer in gate.named_buffers(recurse=False):
            persistent = name not in gate._non_persistent_buffers_set
            self.register_buffer(name, buffer, persistent=persistent)
        self.train(gate.training)

    def reset_parameters(self) -> None:
        """Only the state: the weight is the model's to initialise."""
        self.reset_state()

    def take_pretrained_bias(self) -> None:
        """Mode `sign` goes on from the bias that the model was trained with: it is in the same units."""
        found = dict(self.named_buffers()).get(_PRETRAINED_BIAS)
        if found is not None and self.elb.mode == "sign":
            self.expert_bias.copy_(found)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits, gate weights, ids), as the gate that stood here."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._rule.computes_fp32:
            logits_TE = F.linear(x_TD.float(), self.weight.float())
        else:
            logits_TE = F.linear(x_TD, self.weight)
        length = hidden_states.shape[1] if hidden_states.dim() == 3 else None
        weights_TK, ids_TK, _ = self.route(logits_TE.float(), sequence_length=length)
        if self._rule.rounds_weights:
            weights_TK = weights_TK.to(logits_TE.dtype)
        return logits_TE, weights_TK, ids_TK


def _is_replaceable(block: torch.nn.Module, gate: torch.nn.Module) -> bool:
    if isinstance(gate, ElbRouter):
        return False
    weight, top_k = getattr(gate, "weight", None), getattr(gate, "top_k", None)
    experts = getattr(block, "experts", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 2:
        return False
    if not isinstance(top_k, int) or not isinstance(experts, torch.nn.Module):
        return False
    if [name for name, _ in gate.named_parameters()] != ["weight"]:
        return False
    weights = [p for p in experts.parameters() if p.dim() == 3]
    return bool(weights) and all(p.shape[0] == weight.shape[0] for p in weights)


def _plain_copy(gate: torch.nn.Module) -> torch.nn.Module:
    """A copy on the CPU in evaluation mode, buffers at zero: a bias is no part of the rule."""
    copied = copy.deepcopy(gate).to_empty(device="cpu").eval()
    for buffer in copied.buffers():
        buffer.zero_()
    return copied.float()


def _not_understood(path: str, what: str) -> InputError:
    return InputError(
        f"{path} routes to experts in a way that is not understood ({what})",
        remedy="set elb.mode to none to keep the model's own routing, or give it a "
        "deepopt.moe.ElbRouter",
    )
